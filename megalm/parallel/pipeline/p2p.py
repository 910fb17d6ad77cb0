"""Messages between pipeline ranks: activations and their gradients, one way from rank to rank.

    sender       send 0    send 1    send 2  ...         never waits for the receiver, but for the one `limit` sends ago
                   \\         \\         \\
    receiver   [post 0    post 1]   post 2   ...         `AHEAD` receives are posted before they are needed

What one rank sends another it receives in the same order, so a message needs no tag, and its shape is known from the
data, so it needs no header. A group carries messages one way only between two ranks (`down` to the next one, `up` to
the one before): NCCL runs the sends and receives of a pair of ranks and a group one after the other, so that two that
cross in one group could wait for each other for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.pipeline.plan import goes_down

AHEAD = 2  # receives that wait for each sender: one is being filled while the other is taken
Shape = tuple[int, ...]


def one_way(mesh: Mesh, source: int, target: int) -> Axis:
    """The group for messages from pipeline rank `source` to its neighbour `target`."""
    return mesh.down if goes_down(source, target, mesh.pipeline.size) else mesh.up


def _group(axis: Axis) -> ProcessGroup:
    assert axis.group is not None, "only a pipeline of several ranks sends messages"
    return axis.group


def warm_up(mesh: Mesh) -> None:
    """Sends a byte along each way, one after the other in the same order on all ranks: NCCL makes a communicator for
    two ranks with their first message, and ranks that do so in different orders would wait for each other."""
    size, rank = mesh.pipeline.size, mesh.pipeline.rank
    byte = torch.zeros(1, dtype=torch.uint8, device=mesh.device)
    ways = {(i, (i + step) % size) for i in range(size) for step in (1, -1)} if size > 1 else set()
    for source, target in sorted(ways):
        group = _group(one_way(mesh, source, target))
        if rank == source:
            group.send([byte], target, 0).wait()
        elif rank == target:
            group.recv([byte], source, 0).wait()
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


@contextmanager
def _peer_named(axis: Axis, peer: int, doing: str) -> Iterator[None]:
    """An error of the other side tells which side that is."""
    try:
        yield
    except RuntimeError as error:
        where = f"pipeline rank {peer} (rank {axis.ranks[peer]})"
        raise RuntimeError(f"{where} died or took too long while this rank was {doing}: {error}") from error


class Buffers:
    """Memory for what is received. What is given back is used again, so that there are never more buffers than messages
    that were alive at once, however many micro-batches a step has."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.made = 0
        """Buffers that exist."""
        self._free: dict[Shape, list[Tensor]] = {}

    def begin(self, shapes: Sequence[Shape]) -> None:
        """Forgets those of shapes that this step has not."""
        for shape in self._free.keys() - set(shapes):
            self.made -= len(self._free.pop(shape))

    def take(self, shape: Shape) -> Tensor:
        if free := self._free.get(shape):
            return free.pop()
        self.made += 1
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def give(self, buffer: Tensor) -> None:
        self._free.setdefault(buffer.shape, []).append(buffer)


class Inbox:
    """What one pipeline rank sends this one in a step, in order."""

    def __init__(self, mesh: Mesh, source: int, buffers: Buffers) -> None:
        self.source, self.buffers = source, buffers
        self.axis = one_way(mesh, source, mesh.pipeline.rank)
        self.group = _group(self.axis)
        self.micro_batches: list[int] = []
        """Of each message."""
        self._posted = 0
        self._waiting: dict[int, tuple[dist.Work, Tensor]] = {}

    def expect(self, micro_batch: int) -> int:
        """There is one more message in each step; returns its number."""
        self.micro_batches.append(micro_batch)
        return len(self.micro_batches) - 1

    def begin(self, shapes: Sequence[Shape]) -> None:
        """Begins a step whose micro-batches have these shapes: posts the first receives."""
        self.shapes, self._posted = shapes, 0
        self._waiting.clear()
        self._prefetch()

    def post(self, number: int) -> None:
        """From now on the sender can get rid of message `number`."""
        while self._posted <= number:
            buffer = self.buffers.take(self.shapes[self.micro_batches[self._posted]])
            with _peer_named(self.axis, self.source, f"asking for message {self._posted} from it"):
                self._waiting[self._posted] = (self.group.recv([buffer], self.source, 0), buffer)
            self._posted += 1

    def take(self, number: int) -> Tensor:
        """Waits for message `number`; the caller gives the buffer back. (With NCCL the stream waits, not the CPU.)"""
        self.post(number)
        work, buffer = self._waiting.pop(number)
        with _peer_named(self.axis, self.source, f"waiting for message {number} from it"):
            work.wait()
        self._prefetch()
        return buffer

    def _prefetch(self) -> None:
        while len(self._waiting) < AHEAD and self._posted < len(self.micro_batches):
            self.post(self._posted)


class Outbox:
    """What this rank sends one pipeline rank. At most `limit` messages wait to be received: a plan that completes even
    if each send blocks completes if one waits for an older one."""

    def __init__(self, mesh: Mesh, target: int, limit: int) -> None:
        self.target, self.limit = target, limit
        self.axis = one_way(mesh, mesh.pipeline.rank, target)
        self.group = _group(self.axis)
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Keeps the tensor until it is sent. gloo tells only who waits that a send is complete: hence the limit."""
        leaving = self._leaving
        while leaving and leaving[0][0].is_completed():
            leaving.popleft()
        if len(leaving) >= self.limit:
            self._wait()
        with _peer_named(self.axis, self.target, "sending to it"):
            leaving.append((self.group.send([tensor], self.target, 0), tensor))

    def finish(self) -> None:
        """Waits until all is sent."""
        while self._leaving:
            self._wait()

    def _wait(self) -> None:
        with _peer_named(self.axis, self.target, "sending to it"):
            self._leaving.popleft()[0].wait()
