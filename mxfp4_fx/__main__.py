"""``python -m mxfp4_fx``."""

import sys

from mxfp4_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
