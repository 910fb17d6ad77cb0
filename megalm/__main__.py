"""`python -m megalm`: the `megalm` command, as launchers of processes start it.

DeepSpeed's launcher adds `--local_rank=N`, which its environment says as well.
"""

from __future__ import annotations

import sys

from megalm.cli import main

if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]))
