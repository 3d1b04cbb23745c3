"""Real pretrained models by name: where their weights come from, and where they lie on this machine.

python -m textkv.models list
python -m textkv.models install smollm2

Nothing is fetched but by that command. `resolve` turns a name into what `from_pretrained` takes, everywhere where a
text command has `--model`.
"""

from textkv.models.catalogue import CATALOGUE, Release, find
from textkv.models.loading import load, resolve
from textkv.models.place import folder_of, root

__all__ = ["CATALOGUE", "Release", "find", "folder_of", "load", "resolve", "root"]
