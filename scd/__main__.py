"""`python -m scd` is the command `scd`, also under `torchrun` or `accelerate launch`."""

import sys

from scd.cli import main

if __name__ == "__main__":
    sys.exit(main())
