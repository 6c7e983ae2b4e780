"""`python -m meshuffle`, which torchrun and SLURM start too."""

import sys

from meshuffle.cli import main

if __name__ == "__main__":
    sys.exit(main())
