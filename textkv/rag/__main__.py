"""python -m textkv.rag: see `textkv.rag.commands`."""

import sys

from textkv.rag.commands import main

if __name__ == "__main__":
    sys.exit(main())
