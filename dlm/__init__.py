"""Diffusion language models on current transformers: native LLaDA and Dream, cache policies, unmasking rules."""
