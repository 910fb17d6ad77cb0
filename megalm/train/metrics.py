"""A run's numbers: one JSON object a line in `metrics.jsonl`, and the same in TensorBoard."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import orjson

from megalm.errors import UserError
from megalm.files import write_atomic

logger = logging.getLogger("megalm")


class Metrics:
    """Appends to `path`, and to TensorBoard events in `events` if given. Lines after `last_step` are dropped first:
    they are of steps that a killed run took after its last checkpoint, and that will be taken again."""

    def __init__(self, path: Path, events: Path | None, last_step: int) -> None:
        if path.exists():
            write_atomic(path, b"".join(_lines_until(path, last_step)))
        self._path, self._file = path, path.open("ab")
        self._events = None
        if events is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._events = SummaryWriter(str(events), purge_step=last_step + 1)

    def write(self, values: dict[str, Any]) -> None:
        """`values` has `step`. UserError if it cannot be written; half a line is dropped when the run goes on."""
        try:
            self._file.write(orjson.dumps(values) + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}; the last checkpoint is intact") from error
        if self._events is not None:
            kind = values.get("kind", "train")
            for name, value in _flat(values):
                self._events.add_scalar(f"{kind}/{name}", value, values["step"])

    def sync(self) -> None:
        """Makes all lines so far durable: called before the checkpoint that counts on them."""
        os.fsync(self._file.fileno())
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _lines_until(path: Path, last_step: int) -> list[bytes]:
    """The lines of steps up to `last_step`, without damaged ones: half written, or lost in a power cut."""
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            if orjson.loads(line)["step"] <= last_step and line.endswith(b"\n"):
                kept.append(line)
        except (orjson.JSONDecodeError, KeyError, TypeError):
            logger.warning("%s: line %d was damaged and is left out", path, number)
    return kept


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers by name, nested ones as `outer/inner`."""
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            flat.append((prefix + name, value))
    return flat
