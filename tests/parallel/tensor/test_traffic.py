"""What tensor ranks send, counted, is what the formula says: no collective is hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import Case, batch, build, tensor_mesh
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.model.counts import tensor_bytes
from megalm.model.transformer import Stage
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue


class Counter(TorchDispatchMode):
    """Bytes that a rank sends."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes, self.names = size, 0.0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if ("c10d" in name and "wait" not in name) or name.startswith("megalm.scatter"):
            shares = {"all_to_all_single": 1 / self.size, "scatter_sum": 1 / self.size, "all_reduce": 2 / self.size}
            self.bytes += shares[name.split(".")[1]] * (self.size - 1) * args[0].nbytes
            self.names.add(name)
        return out


def counted(case: Case, stage: Stage) -> tuple[float, int]:
    size, copies = dist.get_world_size(), max(1, dist.get_world_size() // 2)
    queue = WeightGradientQueue() if case.deferred else None
    model = build(case, TensorParallel(tensor_mesh(copies).tensor, case.sequence, case.overlap, queue), stage=stage)
    inputs = batch()
    x_RD = None
    if not stage.embeds:
        rows = len(inputs.tokens_T) // (size if case.sequence else 1)
        x_RD = torch.randn(rows, model.config.hidden_size, dtype=case.dtype, requires_grad=True)
    with Counter(size) as counter:
        out = model(inputs, x_RD)
        objective = out[0] if stage.predicts else out.square().sum()
        if queue is None:
            objective.backward()
        else:
            with queue.defer(0):
                objective.backward()
            queue.run(0)
    formula = tensor_bytes(
        model.config,
        len(inputs.tokens_T),
        size,
        case.dtype.itemsize,
        sequence=case.sequence,
        recompute=case.recompute,
        layers=len(model.layers),
        embeds=stage.embeds,
        predicts=stage.predicts,
    )
    return counter.bytes, formula


WHOLE, FIRST, MIDDLE = Stage(0, 2, True, True), Stage(0, 1, True, False), Stage(1, 2, False, False)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("case", "stage"),
    [
        (Case(dtype=torch.float32), WHOLE),
        (Case(sequence=False), WHOLE),
        (Case({"label_smoothing": 0.1, "dropout": 0.1}, overlap=3), WHOLE),
        (Case({"qk_norm": True}, deferred=True), WHOLE),
        (Case(recompute="full"), WHOLE),
        (Case(recompute="full", sequence=False), MIDDLE),
        (Case(recompute="selective"), WHOLE),
        (Case(recompute="selective", sequence=False), WHOLE),
        (Case(dtype=torch.bfloat16), FIRST),
        (Case(), MIDDLE),
    ],
    ids=str,
)
def test_bytes_sent_are_those_of_the_formula(case: Case, stage: Stage, size: int) -> None:
    for sent, formula in run_ranks(size, counted, case, stage):
        assert sent == formula > 0
