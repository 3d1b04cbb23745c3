"""agentkv: GUI agents whose screenshots take little memory. Importing it registers its methods beside textkv's."""

import textkv  # noqa: F401  (first: it hears what the imports below raise)
from agentkv.gui_kv import GuiKV, GuiKVOfficial
from agentkv.gui_kv_next import GuiKVNext
from agentkv.st_lite import STLite, STLiteOfficial
from agentkv.star_kv import StarKV, StarKVOfficial

__all__ = ["GuiKV", "GuiKVNext", "GuiKVOfficial", "STLite", "STLiteOfficial", "StarKV", "StarKVOfficial"]
