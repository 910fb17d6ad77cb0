"""What `megalm launch` hands to each rank, on whichever host: a private folder beside the run's directory, which all
hosts share, so that nothing of it stands on a command line or in a log, or is read by a shell.

    megalm launch -> .tiny.launch-3f2a/job.json (0600) -> deepspeed's launcher on each host
        -> python -m megalm.launch.job FOLDER --local_rank=N -> python -m megalm.train --job=FOLDER CONFIG ...

The first rank leaves the file `done` in the folder when the run has ended well: the launchers between do not tell.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from megalm.errors import UserError


@dataclass(frozen=True)
class Job:
    """A run's start on hosts; `token` stands on the command lines of all its processes."""

    folder: Path
    token: str

    @property
    def word(self) -> str:
        """The folder, in characters that no shell and no launcher takes for its own."""
        return quote(str(self.folder))

    @property
    def ended_well(self) -> bool:
        return (self.folder / "done").exists()


@contextmanager
def job(directory: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> Iterator[Job]:
    """A job that trains in the run `directory`: `python -m megalm.train ARGUMENTS`, in this working directory, with
    `variables` set. Its folder is removed in the end."""
    place = directory.absolute()
    token = secrets.token_hex(6)
    parent = next(parent for parent in place.parents if parent.is_dir())
    folder = parent / f".{place.name}.launch-{token}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise UserError(f"run.dir={directory}: {error.strerror} in {parent}: choose another directory") from None
    try:
        content = {"arguments": list(arguments), "directory": os.getcwd(), "variables": dict(variables)}
        descriptor = os.open(folder / "job.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        yield Job(folder, token)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mark_done(word: str) -> None:
    (Path(unquote(word)) / "done").touch()


def remove(word: str) -> None:
    """For the first rank of a run whose `megalm launch` can no longer do that."""
    shutil.rmtree(unquote(word), ignore_errors=True)


def main() -> None:
    """Becomes the rank, so that its variables are there from its start."""
    [word] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    content = json.loads((Path(unquote(word)) / "job.json").read_text(encoding="utf-8"))
    os.chdir(content["directory"])
    command = [sys.executable, "-u", "-m", "megalm.train", f"--job={word}", *content["arguments"]]
    os.execve(sys.executable, command, {**os.environ, **content["variables"]})


if __name__ == "__main__":
    main()
