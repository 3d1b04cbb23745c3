"""python -m textkv.masa convert|export|train: see `textkv.masa.command`."""

import sys

from textkv.masa.command import main

if __name__ == "__main__":
    sys.exit(main())
