"""`python -m megalm COMMAND`: the `megalm` command where it is not on the path, and what launchers start."""

from __future__ import annotations

import os
import sys

from megalm.cli import main
from megalm.launch.lifeline import Lifeline
from megalm.launch.ranks import LOCAL_RANK

if __name__ == "__main__":
    Lifeline(os.environ)
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith(LOCAL_RANK)]))
