"""The weights of the embedded GUI agent, a small Qwen2.5-VL of our own; `training.agent` made them."""
