"""The measuring rooms: one module per question, each a command that prints a table and writes JSON.

This folder is imported as `agentkv.eval`.
"""

from importlib import import_module

if __name__ == "eval":
    import_module("textkv.kernels._bare").alias("eval", "agentkv.eval")
