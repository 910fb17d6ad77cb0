"""`python -m megalm`: the `megalm` command, where it is not on the path."""

import sys

from megalm.cli import main

if __name__ == "__main__":
    sys.exit(main())
