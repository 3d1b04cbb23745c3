"""Caches that outlive one prompt: keys and values that are read once and serve several agents (`kvcomm`), or a whole
conversation under a fixed memory (`epicache`)."""
