"""Calibration of TriAttention (arXiv 2604.04921): where a model's queries lie before the rotary embedding."""
