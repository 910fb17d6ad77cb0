"""When each action of one step ran, on all pipeline ranks: what `megalm plan schedule` draws beside the simulated plan.

The file is that of `timeline.py`. Seconds count from a moment that all ranks agree on, for they leave a barrier
together; CPUs of one machine, which leave it some microseconds apart, have the same clock, and count from the first
one's moment. A receive is as long as the rank waits for it. On a GPU the times are those of its stream, measured with
events, and recording them waits for nothing.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.parallel.mesh import Mesh
from megalm.parallel.pipeline.plan import Action, Placement


class Recording:
    """Of the one step that it is given to; made by all ranks of a pipeline just before it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.bytes = 0
        """What this rank sends in the step."""
        self._spans: list[tuple[Action, Any, Any]] = []
        self._on_gpu = mesh.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(mesh.device)
        if mesh.pipeline.group is not None:
            dist.barrier(mesh.pipeline.group)
        self._zero = self._now()

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """`action` runs inside of this block."""
        start = self._now()
        yield
        self._spans.append((action, start, self._now()))

    def write(self, path: Path, schedule: str, placement: Placement, layers: Sequence[int], micro_batches: int) -> None:
        """Brings the ranks' times together and writes the file, once; all ranks of all pipelines call it. `layers`: of
        each stage."""
        if self._on_gpu:
            torch.cuda.synchronize(self.mesh.device)
        mine = [
            {"action": str(action), "start": self._seconds(start), "end": self._seconds(end)}
            for action, start, end in self._spans
        ]
        clock = socket.gethostname(), 0.0 if self._on_gpu else self._zero
        ranks: list[Any] = [(mine, self.bytes, clock)] * self.mesh.pipeline.size
        if self.mesh.pipeline.group is not None:
            dist.all_gather_object(ranks, (mine, self.bytes, clock), group=self.mesh.pipeline.group)
        if self.mesh.rank == 0:
            first: dict[str, float] = {}
            for spans, _, (host, zero) in ranks:
                late = zero - first.setdefault(host, zero)
                for span in spans:
                    span |= {"start": span["start"] + late, "end": span["end"] + late}
            content = {
                "schedule": schedule,
                "placement": placement,
                "layers": layers,
                "micro_batches": micro_batches,
                "bytes": sum(sent for _, sent, _ in ranks),
                "ranks": [spans for spans, *_ in ranks],
            }
            try:
                write_atomic(path, json.dumps(content).encode())
            except OSError as error:
                raise UserError(f"{path}: cannot write: {error.strerror}; the last checkpoint is intact") from error

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        return self._zero.elapsed_time(moment) / 1000 if self._on_gpu else moment - self._zero
