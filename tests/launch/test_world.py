"""What ranks agree on before a process group is made."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys

from megalm.errors import RunFailed, UserError
from megalm.launch.ranks import Process
from megalm.launch.world import World

rank, port, broken, error = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def prepare():
    if rank == broken:
        raise {"bug": ZeroDivisionError, "mistake": UserError}[error]("odd")
    return "prepared"

try:
    World(Process(rank, rank, 2, "localhost", port)).agree(prepare, lambda it: {"a": it}, lambda it: 60.0)
except BaseException as raised:
    print(type(raised).__name__, raised)
"""


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("error", "told", "silent"), [("bug", "ZeroDivisionError", "UserError"), ("mistake", "UserError", "RunFailed")]
)
def test_what_a_rank_raises_before_the_start_ends_all(broken: int, error: str, told: str, silent: str) -> None:
    with socket.create_server(("localhost", 0)) as trial:
        port = str(trial.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), port, str(broken), error], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].decode().split()[0] for rank in ranks]
    if error == "bug":
        assert said[broken] == told
        assert said[1 - broken] == (silent if broken else "RunFailed")
    else:
        assert said == [told, silent]
