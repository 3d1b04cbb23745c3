"""The fonts that everything we draw is drawn with: Liberation 2.1.5, beside this file (licence: LICENSE.txt).

Figures from before were drawn with its forerunner 1.07, whose letters have the same widths; `make demo` gives equal
rows with both, and 2.1.5 has the freer licence.

Pillow takes a face by file (`face`). Chromium finds fonts through fontconfig, which `environment` points at our own
`fonts.conf`: it knows this folder and nothing of the machine, so native controls and lists, canvases and missing glyphs
(blank, never another font's) are covered too. Where Chromium does not listen to it (macOS, a snap that sets its own),
`page_script` puts the same faces into every document under the names that pages ask for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files("agentkv.envs"))) / "fonts"
CONFIG = FOLDER / "fonts.conf"
FILES = {"sans": "LiberationSans", "serif": "LiberationSerif", "mono": "LiberationMono"}
_ALL = ("Regular", "Bold", "Italic", "BoldItalic")
# no task slants monospaced text
STYLES = {"sans": _ALL, "serif": _ALL, "mono": ("Regular", "Bold")}

# what pages call each family; fonts.conf has the same names (and the generic ones, which a page cannot define)
NAMES = {
    "sans": ("Liberation Sans", "Arial", "Helvetica"),
    "serif": ("Liberation Serif", "Times New Roman", "Times"),
    "mono": ("Liberation Mono", "Courier New", "Courier"),
}
# any of these would make fontconfig look elsewhere
_FOREIGN = ("FONTCONFIG_PATH", "FONTCONFIG_SYSROOT")

# does Chromium know a name that only our fonts.conf has? Without it the second family decides the width
KNOWS_CONFIG = """
() => {
  const pen = document.createElement('canvas').getContext('2d');
  const wide = (font) => { pen.font = `40px ${font}`; return pen.measureText('iiii').width; };
  return wide('agentkv-sans, agentkv-mono') !== wide('agentkv-mono') && wide('agentkv-sans') === wide('Arial');
}
"""


def face(family: str = "sans", style: str = "Regular") -> Path:
    """The file of a face: family "sans", "serif" or "mono", style one of its `STYLES`. Raises ValueError for others."""
    if style not in STYLES.get(family, ()):
        known = "; ".join(f"{name}: {', '.join(styles)}" for name, styles in STYLES.items())
        raise ValueError(f"there is no face {family!r} {style!r}; there are {known}")
    return FOLDER / f"{FILES[family]}-{style}.ttf"


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` with which a program sees our fonts and none of the machine's."""
    kept = {name: value for name, value in inherited.items() if name not in _FOREIGN}
    return kept | {"FONTCONFIG_FILE": str(CONFIG)}


@cache
def page_script() -> str:
    """An init script that gives a document our faces under `NAMES`, before its own scripts and styles.

    Faces made from bytes need no loading, so the first layout has them already. What stays the machine's there: a bare
    generic name in a page's style (`font-family: serif`), lists that open as windows of their own, missing glyphs.
    """
    faces = [
        {
            "names": NAMES[family],
            "weight": "bold" if "Bold" in style else "normal",
            "style": "italic" if "Italic" in style else "normal",
            "bytes": base64.b64encode(face(family, style).read_bytes()).decode(),
        }
        for family, styles in STYLES.items()
        for style in styles
    ]
    return (FOLDER / "page.js").read_text(encoding="utf-8").replace("FACES", json.dumps(faces))
