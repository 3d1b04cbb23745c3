"""python -m textkv.tri_attention calibrate: see `textkv.tri_attention.calibrate`."""

import sys

from textkv.tri_attention.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
