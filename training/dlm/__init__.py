"""The mini diffusion models and their guider: batches, masks, hints and training on arithmetic word problems."""
