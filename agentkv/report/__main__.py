"""`python -m agentkv.report RUN`: draw the page of a run again from its traces."""

import sys
from pathlib import Path

from agentkv.report import write_report

if len(sys.argv) != 2:
    sys.exit("usage: python -m agentkv.report RUN   (RUN is the --out folder of a run)")
try:
    print(write_report(Path(sys.argv[1])))
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
