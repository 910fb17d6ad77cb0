"""A run's directory, and finding what is in it again.

runs/tiny/config.yaml        resolved        tokenizer/       a copy of what text was encoded with
          metrics.jsonl      numbers         tensorboard/     the same
          train.log          what was said   checkpoints/step-00000100/
          stopped            why, if the run was told to stop before its end: whoever starts jobs starts it again
"""

from __future__ import annotations

import grp
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalm.checkpoint import Place, latest, place
from megalm.checkpoint.places import names
from megalm.config import Config, to_yaml
from megalm.config.text import read_yaml
from megalm.data.tokenizer import FILES, RECORD, Tokenizer, load_tokenizer
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.launch.slurm import STOPPED
from megalm.locks import lock

CHECKPOINTS = "checkpoints"
TOKENIZER_FILES = (RECORD, *FILES.values())
MARK = ".megalm-run"  # the file that makes a directory a run's, and its lock


class RunLog(logging.FileHandler):
    """The log file; what cannot be written to it ends the run instead of being printed among its lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        raise UserError(f"{self.baseFilename}: cannot write: {error}; the last checkpoint is intact") from error


@contextmanager
def private(group: str | None) -> Iterator[None]:
    """While inside, what this process makes is for its owner alone, or for a group to read, too."""
    former = os.umask(0o077)
    os.umask(former | (0o027 if group else 0o077))
    try:
        yield
    finally:
        os.umask(former)


def check_directory(directory: Path, group: str | None = None) -> None:
    """Raises a UserError if no run can live in `directory` and be read by `group`; writes nothing."""
    if group is not None:
        try:
            number = grp.getgrnam(group).gr_gid
        except KeyError:
            raise UserError(f"run.group={group}: there is no such group on {socket.gethostname()}") from None
        if os.geteuid() and number not in (os.getegid(), *os.getgroups()):
            raise UserError(f"run.group={group}: you are not in it: choose one of yours (`id -Gn`), or null")
    here = directory
    while not here.exists():
        here = here.parent
    if not here.is_dir():
        raise UserError(f"run.dir={directory}: {here} is a file: choose another directory")
    if not os.access(here, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={directory}: {here} may not be written to: choose another directory")
    names = sorted(os.listdir(directory)) if here == directory else []
    if names and MARK not in names:
        raise UserError(
            f"run.dir={directory}: holds other files ({names[0]}) and no run (no {MARK}): choose a new or empty "
            "directory"
        )
    if CHECKPOINTS in names and not (directory / CHECKPOINTS).is_dir():
        raise UserError(f"{directory / CHECKPOINTS}: is a file: remove it")


@contextmanager
def opened(directory: Path, group: str | None = None) -> Iterator[None]:
    """Makes a run's directory, keeps other processes out of it, and logs to its `train.log`.

    A directory that was new or empty is so again if the run fails before it has a number to show.
    """
    check_directory(directory, group)
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if group is not None and not existed:
        shutil.chown(directory, group=group)
        directory.chmod(0o2750)  # what is made inside is of the same group
    held = lock(directory / MARK, wait=False)
    if held is None:
        raise UserError(f"run.dir={directory}: another process trains there: choose another directory")
    with held:  # who does not hold the lock removes nothing
        fresh = os.listdir(directory) == [MARK]
        try:
            with _logging(directory):
                yield
        except BaseException:
            metrics = directory / "metrics.jsonl"
            if fresh and not (metrics.exists() and metrics.stat().st_size):
                shutil.rmtree(directory, ignore_errors=True)
                if existed:
                    directory.mkdir()
            raise


@contextmanager
def _logging(directory: Path) -> Iterator[None]:
    handler = RunLog(directory / "train.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("megalm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def mark_stopped(directory: Path, reason: str) -> None:
    """Leaves word that the run is not complete, although its processes have ended well."""
    write_atomic(directory / STOPPED, f"{reason}\n".encode())


def describe(config: Config, directory: Path) -> None:
    """Writes what the run is made of into its directory: the resolved config and the tokenizer. It goes on."""
    (directory / STOPPED).unlink(missing_ok=True)
    write_atomic(directory / "config.yaml", to_yaml(config).encode())
    _copy_tokenizer(config.tokenizer.path, directory / "tokenizer")


def _copy_tokenizer(path: str, target: Path) -> None:
    """So that the directory can be used after the original has moved. `byte` is no path and needs no copy."""
    source = Path(path)
    if source.resolve() == target.resolve():
        return
    fresh = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    if path != "byte":
        fresh.mkdir()
        for file in [source / name for name in TOKENIZER_FILES] if source.is_dir() else [source]:
            if file.is_file():
                shutil.copy2(file, fresh)
    shutil.rmtree(target, ignore_errors=True)
    if fresh.exists():
        fresh.rename(target)


def checkpoints_of(config: Config, directory: Path) -> Place:
    """Where the run in `directory` has its checkpoints."""
    path = config.checkpoint.path
    return directory / CHECKPOINTS if path is None else place(path, "checkpoint.path")


def find_checkpoint(path: Place) -> Place:
    """The checkpoint that `path` names: itself, or the newest of a run directory, or of a place of checkpoints."""
    if not names(path):
        raise UserError(f"{path}: no such checkpoint: name a run directory or one of its checkpoints/step-...")
    if "manifest.json" in names(path):
        return path
    found = latest(root_of(path))
    if found is None:
        raise UserError(f"{path}: holds no complete checkpoint: train first, or name another directory")
    return found


def root_of(path: Place) -> Place:
    """The place of checkpoints that `path` names: itself, or a run's, wherever it has them."""
    if isinstance(path, Path) and (path / "config.yaml").is_file():
        elsewhere = read_yaml(path / "config.yaml").get("checkpoint", {}).get("path")
        return place(elsewhere) if elsewhere else path / CHECKPOINTS
    return path / CHECKPOINTS if CHECKPOINTS in names(path) else path


def run_of(path: Path, checkpoint: Place) -> Path:
    """The directory of the run of a checkpoint that was found at `path`."""
    if isinstance(checkpoint, Path) and not (path / "config.yaml").is_file():
        return checkpoint.resolve().parents[1]
    return path


def tokenizer_of(run: Path, checkpoint: Place, state: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that goes with a checkpoint: the copy in its run's directory, or the original; None if a model was
    imported without one. Raises UserError if it is another than then."""
    copied = run / "tokenizer"
    if state["tokenizer"] is None:
        return None
    original = state["config"]["tokenizer"]["path"] if "config" in state else str(copied)
    path = _tokenizer_path(copied) if copied.is_dir() else original
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != state["tokenizer"]:
        raise UserError(
            f"{path}: is not the tokenizer that {checkpoint} was trained with: put that one there, or keep "
            "the checkpoint in its run directory, which holds a copy"
        )
    return tokenizer


def _tokenizer_path(copied: Path) -> str:
    """A directory that `megalm tokenizer train` wrote, or the one file that was given as a tokenizer."""
    files = sorted(copied.iterdir())
    return str(files[0] if len(files) == 1 else copied)
