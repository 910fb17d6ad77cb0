"""Linear layers whose matrix is shared by the ranks of the tensor axis (Megatron-LM, arXiv 1909.08053 and 2205.05198).

    column: each rank has some outputs          row: each rank has some inputs

    forward     x_RD -gather-> x_TD W^T         x_TF W^T -scatter, sum-> y_RD
    backward    g_TF W -scatter, sum-> g_RD     g_RD -gather-> g_TD W
    weights     g_TF^T x_TD                     g_TD^T x_TF

With sequence sharding a rank holds R = T / size rows of what is between the layers (else R = T: no gather, and the sum
goes to all). A column layer keeps only its R rows and gathers them again in backward, while the input's gradient is
computed; that gradient travels while the weight's is computed. In forward a gather of several chunks travels while the
chunk before is multiplied, and so does the sum of a row layer.

Parameters may be wider than the input: they are cast to its type, and their gradients come in their own.

Shapes: R rows of this rank, T rows of all, C rows of a chunk of all, D hidden, F outputs or inputs of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import start_gather, start_scatter_sum, start_sum, wait
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import Product, add_gradient


class ColumnLinear(nn.Module):
    """Weight [outputs, inputs] cut along its outputs; `copies` neighbours hold the same ones. See `column`."""

    def __init__(self, tp: TensorParallel, inputs: int, outputs: int, bias: bool, copies: int = 1) -> None:
        super().__init__()
        self.parts = {"weight": tp.part((outputs, inputs), 0, copies)}
        if bias:
            self.parts["bias"] = tp.part((outputs,), 0, copies)
        self.weight, self.bias = _parameters(self.parts)


class RowLinear(nn.Module):
    """y = x W^T + b with the weight [outputs, inputs] cut along its inputs. Takes x_TF, gives y_RD."""

    def __init__(self, tp: TensorParallel, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.tp = tp
        self.parts = {"weight": tp.part((outputs, inputs), 1)}
        if bias:
            self.parts["bias"] = tp.copied(outputs, partial=tp.sequence)
        self.weight, self.bias = _parameters(self.parts)

    def forward(self, x_TF: Tensor) -> Tensor:
        if _is_plain(self.tp):
            return _linear(x_TF, self.weight, self.bias)
        return _row(x_TF, self.tp, self.weight, self.bias)


def column(x_RD: Tensor, layers: Sequence[ColumnLinear], tp: TensorParallel) -> list[Tensor]:
    """y_TF = x W^T + b of each layer; all of them read the same input, which travels once."""
    if _is_plain(tp):
        return [_linear(x_RD, layer.weight, layer.bias) for layer in layers]
    weights = (layer.weight for layer in layers)
    biases = (layer.bias for layer in layers if layer.bias is not None)
    return _columns(x_RD, tp, len(layers), *weights, *biases)


def _parameters(parts: dict[str, Part]) -> tuple[nn.Parameter, nn.Parameter | None]:
    weight, bias = (nn.Parameter(torch.empty(parts[k].size)) if k in parts else None for k in ("weight", "bias"))
    assert weight is not None
    return weight, bias


def _is_plain(tp: TensorParallel) -> bool:
    """Whether autograd's own linear layer does all that is asked for."""
    return tp.axis.size == 1 and (tp.queue is None or not tp.queue.splits)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


# What is sent and what waits is not for the compiler: it compiles what is between the layers.
@torch.compiler.disable
def _columns(x_RD: Tensor, tp: TensorParallel, count: int, *parameters: Tensor) -> list[Tensor]:
    return list(_Column.apply(x_RD, tp, count, *parameters))


@torch.compiler.disable
def _row(x_TF: Tensor, tp: TensorParallel, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Row.apply(x_TF, tp, weight, bias)


def _gathered_chunks(x_RD: Tensor, tp: TensorParallel) -> Iterator[Tensor]:
    """The rows of all ranks, chunk by chunk: the next one travels while the caller computes with one."""
    if not tp.shards_rows:
        yield x_RD
        return
    first, *rest = x_RD.chunk(tp.overlap)
    coming = start_gather(first, tp.axis)
    for chunk in rest:
        arrived, coming = coming, start_gather(chunk, tp.axis)
        yield wait(arrived)
    yield wait(coming)


def _in_order(chunks_CF: list[Tensor], size: int) -> Tensor:
    """The rows of all chunks, rank by rank: each chunk has some of every rank's."""
    if len(chunks_CF) == 1:
        return chunks_CF[0]
    return torch.cat([y_CF.unflatten(0, (size, -1)) for y_CF in chunks_CF], 1).flatten(0, 1)


@dataclass
class _WeightGradients:
    """g^T x of layers that read the same input; `compute` may wait for `prepare`, which gathers the input again."""

    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    x: Tensor
    tp: TensorParallel
    gathers: bool
    whole: Tensor | None = None

    def prepare(self) -> None:
        if self.whole is None:
            self.whole = start_gather(self.x, self.tp.axis) if self.gathers else self.x

    def compute(self) -> list[Tensor]:
        self.prepare()
        assert self.whole is not None
        x = wait(self.whole) if self.gathers else self.whole
        return [torch.mm(g.t(), x).to(p.dtype) for g, p in zip(self.gradients, self.parameters, strict=True)]

    def run(self) -> None:
        for parameter, gradient in zip(self.parameters, self.compute(), strict=True):
            add_gradient(parameter, gradient)

    def now_or_later(self) -> Sequence[Tensor | None]:
        """The gradients, or None for each where they are left to the queue."""
        if not self.tp.defers:
            return self.compute()
        assert self.tp.queue is not None
        self.tp.queue.put(Product(self.run, self.prepare if self.gathers else None))
        return [None] * len(self.parameters)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, tp, count, *parameters):  # type: ignore[no-untyped-def]
        weights, biases = parameters[:count], parameters[count:] or [None] * count
        narrow = [weight.to(x_RD.dtype) for weight in weights]
        biases = [None if bias is None else bias.to(x_RD.dtype) for bias in biases]
        ctx.tp, ctx.parameters = tp, parameters
        ctx.save_for_backward(x_RD, *narrow)
        chunks: list[list[Tensor]] = [[] for _ in weights]
        for x_CD in _gathered_chunks(x_RD, tp):
            for ys, weight, bias in zip(chunks, narrow, biases, strict=True):
                ys.append(F.linear(x_CD, weight, bias))
        return tuple(_in_order(ys, tp.axis.size) for ys in chunks)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        x_RD, *narrow = ctx.saved_tensors
        tp, weights, biases = ctx.tp, ctx.parameters[: len(narrow)], ctx.parameters[len(narrow) :]
        products = _WeightGradients(weights, gradients, x_RD, tp, tp.shards_rows)
        if not tp.defers:
            products.prepare()
        # Last layer first and rounded each, as autograd adds them up: with and without a queue the bits are the same.
        gx_TD = torch.mm(gradients[-1], narrow[-1])
        for g_TF, weight in zip(gradients[-2::-1], narrow[-2::-1], strict=True):
            gx_TD += torch.mm(g_TF, weight)
        gx_RD = (start_scatter_sum if tp.shards_rows else start_sum)(gx_TD, tp.axis)
        bias_gradients = [g_TF.sum(0, dtype=bias.dtype) for g_TF, bias in zip(gradients, biases, strict=False)]
        weight_gradients = products.now_or_later()
        gx_RD = gx_RD if gx_RD is gx_TD else wait(gx_RD)
        return gx_RD, None, None, *weight_gradients, *bias_gradients


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TF, tp, weight, bias):  # type: ignore[no-untyped-def]
        narrow = weight.to(x_TF.dtype)
        ctx.tp, ctx.weight, ctx.bias = tp, weight, bias
        ctx.save_for_backward(x_TF, narrow)
        if tp.axis.size == 1:
            return _linear(x_TF, narrow, bias)
        if tp.shards_rows:
            by_rank = x_TF.unflatten(0, (tp.axis.size, -1))
            parts = [part.flatten(0, 1) for part in by_rank.chunk(tp.overlap, 1)]
            coming = [start_scatter_sum(F.linear(x_CF, narrow), tp.axis) for x_CF in parts]
            y_RD = wait(coming[0]) if len(coming) == 1 else torch.cat([wait(y_CD) for y_CD in coming])
        else:
            y_RD = wait(start_sum(F.linear(x_TF, narrow), tp.axis))
        return y_RD if bias is None else y_RD + bias.to(y_RD.dtype)  # not in place: recomputation may keep it

    @staticmethod
    def backward(ctx, g_RD):  # type: ignore[no-untyped-def]
        x_TF, narrow = ctx.saved_tensors
        tp = ctx.tp
        g_TD = wait(start_gather(g_RD, tp.axis)) if tp.shards_rows else g_RD
        weight_gradients = _WeightGradients([ctx.weight], [g_TD], x_TF, tp, gathers=False).now_or_later()
        bias_gradient = None if ctx.bias is None else g_RD.sum(0, dtype=ctx.bias.dtype)
        return torch.mm(g_TD, narrow), None, *weight_gradients, bias_gradient
