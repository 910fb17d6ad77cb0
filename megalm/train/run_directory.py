"""A run's directory, and finding a model in it again.

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
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint import latest, load, read_manifest, whole
from megalm.config import Config, resolve, to_yaml
from megalm.data.tokenizer import FILES, RECORD, Tokenizer, load_tokenizer
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.launch.slurm import STOPPED
from megalm.locks import lock
from megalm.model.transformer import Transformer
from megalm.train.build import build_model
from megalm.train.device import DTYPES, pick_device

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


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, and what it was trained with."""

    config: Config
    tokenizer: Tokenizer
    model: Transformer
    sources: dict[str, str]
    """Names of the run's sources by the fingerprints of their data."""


def load_model(path: Path) -> TrainedModel:
    """The model of the checkpoint that `path` names. It is put on a GPU if there is one, wherever it was trained."""
    checkpoint = find_checkpoint(path).resolve()
    state = read_manifest(checkpoint).state
    config = resolve(state["config"], world_size=None)
    copied = checkpoint.parent.parent / "tokenizer"
    tokenizer_path = _tokenizer_path(copied) if copied.is_dir() else config.tokenizer.path
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.fingerprint != state["tokenizer"]:
        raise UserError(
            f"{tokenizer_path}: is not the tokenizer that {checkpoint} was trained with: put that one there, or keep "
            "the checkpoint in its run directory, which holds a copy"
        )
    model = build_model(config.model, pick_device("auto"), DTYPES[config.precision.compute])
    load(checkpoint, whole({f"model.{name}": p for name, p in model.named_parameters()}), prefix="model.")
    sources = {fingerprint: name for name, fingerprint in state["sources"].items()}
    return TrainedModel(config, tokenizer, model.requires_grad_(False), sources)


def _tokenizer_path(copied: Path) -> str:
    """A directory that `megalm tokenizer train` wrote, or the one file that was given as a tokenizer."""
    files = sorted(copied.iterdir())
    return str(files[0] if len(files) == 1 else copied)
