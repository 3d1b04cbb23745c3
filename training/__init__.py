"""How the embedded models were made: their data, their trainer, and the commands that train, measure and install them.

`training.agent`, `training.dlm` and `training.text` hold a model each: its data, its shape and its `Trainer`, all over
the one of `training.trainer`. Nothing that is installed imports this folder; it stays in the repository.
"""

import textkv  # noqa: F401  (first: it hears what the imports of a command raise)
