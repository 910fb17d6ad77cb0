"""Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/): matrices of the blocks move along their momentum
made orthogonal, all else is AdamW's. The update is scaled to the RMS of AdamW's (arXiv 2502.16982), so that the
learning rate is the same.

    M <- momentum M + (1 - momentum) G        U = the orthogonal matrix nearest to G + momentum (M - G), or to M
    W <- (1 - rate decay) W - rate 0.2 sqrt(max(rows, columns)) U

Only U needs the whole matrix. Each matrix has an owner among the ranks that share it (data shards x tensor); round by
round, each rank sends the owners its pieces of one matrix each, makes its own one orthogonal and sends the pieces back,
while the next round's pieces travel. Replicas do the same work again: they lie across the slowest links, and sharing it
would send whole matrices over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.config.sections import Optimizer
from megalm.optim.adamw import build_adamw
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.zero.regions import Region

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # steep at 0, so that few steps do; singular values end near 1


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a matrix."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def of(self, matrix: Tensor) -> Tensor:
        (row, column), (rows, columns) = self.offset, self.size
        return matrix[row : row + rows, column : column + columns]


def takes_muon(region: Region) -> bool:
    return region.name.startswith("layers.") and region.parameter.ndim == 2


def cost(rows: int, columns: int) -> int:
    """Multiplications of a Newton-Schulz step."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


def owners(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that owns each matrix: the dearest first, each to who has least to do."""
    load, owner = [0] * ranks, [0] * len(costs)
    for matrix in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[matrix] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owner[matrix]] += costs[matrix]
    return owner


def rounds(owner: Sequence[int], ranks: int) -> list[list[int | None]]:
    """For each round, the matrix of each rank."""
    mine = [[matrix for matrix, o in enumerate(owner) if o == rank] for rank in range(ranks)]
    return [[m[i] if i < len(m) else None for m in mine] for i in range(max(map(len, mine), default=0))]


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly, by Newton-Schulz steps; in bfloat16 on a GPU, as is usual."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    if tall := len(x) > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Over `held`, the regions of one rank's stages; its groups and state are AdamW's, and the matrices'."""

    def __init__(self, config: Optimizer, held: Sequence[Region], mesh: Mesh) -> None:
        self.axis = mesh.matrices
        self.momentum, self.nesterov = config.momentum, config.nesterov
        self.held = [region for region in held if takes_muon(region)]
        parameters = [region.parameter for region in self.held]
        self.empty = torch.empty(0, dtype=parameters[0].dtype, device=mesh.device)
        super().__init__([{"params": parameters, "weight_decay": config.weight_decay}], {"lr": config.learning_rate})
        self.matrices = self.param_groups[0]
        self.adamw = build_adamw(config, [(r.name, r.parameter) for r in held if not takes_muon(r)])
        # One set of groups and one state, for who sets the learning rate and who saves.
        self.param_groups += self.adamw.param_groups
        self.state.update(self.adamw.state)
        self.adamw.state = self.state
        for parameter in parameters:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        self.pieces = self._all_pieces()
        shapes = [region.part.shape for region in self.held]
        self.rounds = rounds(owners([cost(*shape) for shape in shapes], self.axis.size), self.axis.size)

    def _all_pieces(self) -> list[list[Piece]]:
        """For each matrix, what each rank of the axis holds of it."""
        mine = [Piece(region.offset, region.size) for region in self.held]
        every: list[Any] = [mine]
        if self.axis.size > 1:
            every = [None] * self.axis.size
            dist.all_gather_object(every, mine, group=self.axis.group)
        return [list(pieces) for pieces in zip(*every, strict=True)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.step()
        arriving = self._collect(self.rounds[0]) if self.rounds else None
        returning: Exchange | None = None
        for number, matrices in enumerate(self.rounds):
            assert arriving is not None
            pieces = arriving.wait()
            if number + 1 < len(self.rounds):
                arriving = self._collect(self.rounds[number + 1])
            sent = self._give_back(matrices, pieces)
            if returning is not None:
                self._apply(self.rounds[number - 1], returning.wait())
            returning = sent
        if returning is not None:
            self._apply(self.rounds[-1], returning.wait())

    def _collect(self, matrices: list[int | None]) -> Exchange:
        """Sends each owner this rank's piece of what is to be made orthogonal, and receives all of its own matrix."""
        pieces = [self._update(m) if m is not None else None for m in matrices]
        mine = matrices[self.axis.rank]
        sizes = [prod(p.size) for p in self.pieces[mine]] if mine is not None else [0] * self.axis.size
        return Exchange(pieces, sizes, self.axis, self.empty)

    def _update(self, matrix: int) -> Tensor:
        """Moves the momentum, and gives this rank's piece of the direction."""
        region = self.held[matrix]
        momentum = region.box(self.state[region.parameter]["momentum"])
        assert region.parameter.grad is not None, f"{region.name} has no gradient"
        gradient = region.box(region.parameter.grad)
        momentum.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum) if self.nesterov else momentum

    def _give_back(self, matrices: list[int | None], pieces: list[Tensor]) -> Exchange:
        """Makes this rank's matrix orthogonal, sends each rank its piece, and receives one from each owner."""
        sizes = [prod(self.held[m].size) if m is not None else 0 for m in matrices]
        mine = matrices[self.axis.rank]
        if mine is None:
            return Exchange([None] * self.axis.size, sizes, self.axis, self.empty)
        whole = pieces[0].new_empty(self.held[mine].part.shape)
        for piece, values in zip(self.pieces[mine], pieces, strict=True):
            piece.of(whole).copy_(values.view(piece.size))
        whole = orthogonal(whole)
        return Exchange([piece.of(whole) for piece in self.pieces[mine]], sizes, self.axis, self.empty)

    def _apply(self, matrices: list[int | None], directions: list[Tensor]) -> None:
        rate, decay = self.matrices["lr"], self.matrices["weight_decay"]
        for matrix, direction in zip(matrices, directions, strict=True):
            if matrix is not None:
                region = self.held[matrix]
                box = region.box(region.parameter)
                box.mul_(1 - rate * decay)
                box.add_(direction.view(box.shape).to(box.device), alpha=-rate * 0.2 * sqrt(max(region.part.shape)))


class Exchange:
    """One tensor (or none) to each rank of an axis, and `sizes` elements from each, on the way. `like`: an empty tensor
    of their type, where the communication is."""

    def __init__(self, sent: list[Tensor | None], sizes: list[int], axis: Axis, like: Tensor) -> None:
        self.sizes = sizes
        flat = [piece.flatten().to(like.device) for piece in sent if piece is not None]
        outgoing = torch.cat([like, *flat])
        self.arrived, self.work = outgoing, None
        if axis.size > 1:
            self.arrived = outgoing.new_empty(sum(sizes))
            splits = [0 if piece is None else piece.numel() for piece in sent]
            self.outgoing = outgoing  # alive until it has been sent
            self.work = dist.all_to_all_single(self.arrived, outgoing, sizes, splits, group=axis.group, async_op=True)

    def wait(self) -> list[Tensor]:
        """What came, in the order of the ranks."""
        if self.work is not None:
            self.work.wait()
        return list(self.arrived.split(self.sizes))
