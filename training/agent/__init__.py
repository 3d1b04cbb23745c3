"""The mini GUI agent: drawn and recorded pages, packing, hints, and the training of a small Qwen2.5-VL."""
