"""The embedded default: a small Qwen2.5-VL of our own, its data, its training and its weights."""
