"""`python -m revtrain` is `revtrain`."""

import sys

from revtrain.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
