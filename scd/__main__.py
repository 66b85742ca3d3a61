"""`python -m scd` is the command `scd`; `accelerate launch -m scd ...` starts it on many devices."""

import sys

from scd.cli import main

if __name__ == "__main__":
    sys.exit(main())
