"""A run's directory, and finding what is in it again.

runs/tiny/config.yaml        resolved        tokenizer/       a copy of what text was encoded with
          metrics.jsonl      numbers         tensorboard/     the same
          train.log          what was said   checkpoints/step-00000100/
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.checkpoint import latest
from megalm.config import Config, to_yaml
from megalm.data.tokenizer import FILES, RECORD, Tokenizer, load_tokenizer
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.locks import lock

CHECKPOINTS = "checkpoints"
TOKENIZER_FILES = (RECORD, *FILES.values())
MARK = ".megalm-run"  # the file that makes a directory a run's, and its lock


class RunLog(logging.FileHandler):
    """The log file; what cannot be written to it ends the run instead of being printed among its lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        raise UserError(f"{self.baseFilename}: cannot write: {error}; the last checkpoint is intact") from error


def check_directory(directory: Path) -> None:
    """Raises a UserError if no run can live in `directory`; writes nothing."""
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
def opened(directory: Path) -> Iterator[None]:
    """Makes a run's directory, keeps other processes out of it, and logs to its `train.log`.

    A directory that was new or empty is so again if the run fails before it has a number to show.
    """
    check_directory(directory)
    existed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
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


def describe(config: Config, directory: Path) -> None:
    """Writes what the run is made of into its directory: the resolved config and the tokenizer."""
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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest of a run directory."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint: name a run directory or one of its checkpoints/step-...")
    if (path / "manifest.json").is_file():
        return path
    root = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    found = latest(root) if root.is_dir() else None
    if found is None:
        raise UserError(f"{path}: holds no complete checkpoint: train first, or name another directory")
    return found


def load_run_tokenizer(checkpoint: Path, path: str, fingerprint: str) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with: the copy in its run directory, or else what `path` names."""
    copied = checkpoint.parent.parent / "tokenizer"
    found = _tokenizer_path(copied) if copied.is_dir() else path
    tokenizer = load_tokenizer(found)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{found}: is not the tokenizer that {checkpoint} was trained with: put that one there, or keep "
            "the checkpoint in its run directory, which holds a copy"
        )
    return tokenizer


def _tokenizer_path(copied: Path) -> str:
    """A directory that `megalm tokenizer train` wrote, or the one file that was given as a tokenizer."""
    files = sorted(copied.iterdir())
    return str(files[0] if len(files) == 1 else copied)
