"""agentkv: GUI agents whose screenshots take little memory. Importing it registers `gui-kv` beside textkv's methods."""

from agentkv.gui_kv import GuiKV, GuiKVOfficial

__all__ = ["GuiKV", "GuiKVOfficial"]
