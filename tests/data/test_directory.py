from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.data.directory import new_directory

OWNED = re.compile("file")


def test_what_a_killed_command_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    names = {
        n: tmp_path / f".out.tmp-{n}" for n in (f"{host}-{dead.pid}", f"{host}-{os.getppid()}", f"other-{dead.pid}")
    }
    for path in names.values():
        path.mkdir()
    with new_directory(tmp_path / "out", OWNED, overwrite=False) as directory:
        (directory / "file").touch()
    assert [path.exists() for path in names.values()] == [False, True, True]


def test_a_failed_write_names_the_output_and_not_the_temporary_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="--output") as raised,
        new_directory(tmp_path / "out", OWNED, overwrite=False) as directory,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory / "file"))
    assert raised.value.filename == f"--output {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []
