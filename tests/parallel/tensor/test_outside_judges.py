"""Our tensor-parallel layers against torch's DTensor, Megatron-core and transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layouts import Case, Result, backward, batch, box, build, on_tensor_ranks, tensor_mesh
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy
from peers import llama, llama_name
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from megalm.config.sections import Model
from megalm.model.transformer import Block, Context
from megalm.ops.attention import Segments
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.tensor.vocabulary import VocabularyMatrix

TOKENS, WIDTH, HEADS, HEAD = 24, 32, 4, 8


class PlainBlock(nn.Module):
    """A Llama block of torch's own layers, over one sequence. Each rank has some of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(WIDTH, 1e-5), nn.RMSNorm(WIDTH, 1e-5)
        self.attention = nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH) for n in ("query", "key", "value", "output")})
        sizes = {"gate": (WIDTH, 80), "up": (WIDTH, 80), "down": (80, WIDTH)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.attention_norm(x_TD)
        q, k, v = (self.attention[n](y_TD).unflatten(-1, (-1, HEAD)).transpose(0, 1) for n in ("query", "key", "value"))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x_TD = x_TD + self.attention["output"](out.transpose(0, 1).flatten(1))
        y_TD = self.feed_forward_norm(x_TD)
        return x_TD + self.feed_forward["down"](F.silu(self.feed_forward["gate"](y_TD)) * self.feed_forward["up"](y_TD))


def block_and_torchs(overlap: int) -> None:
    """A block with sequence sharding, ours and of DTensors: outputs, input gradients, weight gradients."""
    mesh, size, rank = tensor_mesh(), dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    plain = PlainBlock().double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    whole = {name: p.detach().clone() for name, p in plain.named_parameters()}
    x_TD, g_TD = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    into, out = {"input_layouts": Shard(0)}, {"output_layouts": Shard(0), "use_local_output": False}
    columns = {f"{m}": ColwiseParallel(**into) for m in ("attention.query", "attention.key", "attention.value")}
    columns |= {f"feed_forward.{m}": ColwiseParallel(**into) for m in ("gate", "up")}
    rows = {m: RowwiseParallel(**out) for m in ("attention.output", "feed_forward.down")}
    norms = {m: SequenceParallel(sequence_dim=0) for m in ("attention_norm", "feed_forward_norm")}
    devices = init_device_mesh("cpu", (size,))
    theirs = parallelize_module(plain, devices, {**columns, **rows, **norms})
    their_x = DTensor.from_local(x_TD.chunk(size)[rank].clone(), devices, [Shard(0)]).requires_grad_()
    their_y = theirs(their_x)
    their_y.backward(DTensor.from_local(g_TD.chunk(size)[rank], devices, [Shard(0)]))

    config = Model(
        num_layers=1, hidden_size=WIDTH, num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD, ffn_size=80,
        position="learned", qkv_bias=True, attention_bias=True, ffn_bias=True,
    )  # fmt: skip
    tp = TensorParallel(mesh.tensor, sequence=True, overlap=overlap)
    ours = Block(config, 0, "none", tp).double()
    parts = {f"{m}.{n}": p for m, module in ours.named_modules() for n, p in getattr(module, "parts", {}).items()}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(box(parts[name], whole[name]))
    x_RD = x_TD.chunk(size)[rank].clone().requires_grad_()
    y_RD = ours(x_RD, Context(Segments.of(torch.tensor([0, TOKENS], dtype=torch.int32), x_RD.device)))
    y_RD.backward(g_TD.chunk(size)[rank])

    assert_close(y_RD, their_y.to_local())
    assert_close(x_RD.grad, their_x.grad.redistribute(placements=[Shard(0)]).to_local())
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parts[name].partial:
            dist.all_reduce(parameter.grad)
        gradient = theirs_by_name[name].grad
        if isinstance(gradient, DTensor):
            gradient = gradient.redistribute(placements=[Replicate()]).to_local()
        assert_close(parameter.grad, box(parts[name], gradient))


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("size", "overlap"), [(2, 1), (4, 3)])
def test_a_block_equals_torchs_own_tensor_parallelism(size: int, overlap: int) -> None:
    run_ranks(size, block_and_torchs, overlap)


def vocabulary_and_megatrons(sequence: bool) -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    tokens, vocabulary = 32, 96
    mesh = tensor_mesh()
    generator = torch.Generator().manual_seed(5)
    whole, head = torch.randn(2, vocabulary, WIDTH, generator=generator)
    tokens_T = torch.randint(vocabulary, (tokens,), generator=generator)
    labels_T = torch.randint(vocabulary, (tokens,), generator=generator)
    g_TD = torch.randn(tokens, WIDTH, generator=generator)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    try:
        config = ModelParallelConfig(tensor_model_parallel_size=size, use_cpu_initialization=True)
        config.perform_initialization = False
        theirs = VocabParallelEmbedding(vocabulary, WIDTH, init_method=nn.init.zeros_, config=config)
        tp = TensorParallel(mesh.tensor, sequence)
        ours = VocabularyMatrix(tp, vocabulary, WIDTH)
        for matrix in (theirs, ours):
            with torch.no_grad():
                matrix.weight.copy_(whole.chunk(size)[rank])
        # Theirs scatters rows on GPUs only, so that ours are compared with its whole output.
        x_TD, x_RD = theirs(tokens_T), ours(tokens_T, torch.float32)
        assert torch.equal(x_RD, tp.local_rows(x_TD))
        x_TD.backward(g_TD)
        x_RD.backward(tp.local_rows(g_TD))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)

        x_TD = x_TD.detach()
        weight = head.chunk(size)[rank].clone().requires_grad_()
        their_loss = vocab_parallel_cross_entropy((x_TD @ weight.t())[:, None], labels_T[:, None]).sum()
        (their_gradient,) = torch.autograd.grad(their_loss, weight)
        ours = VocabularyMatrix(tp, vocabulary, WIDTH)
        with torch.no_grad():
            ours.weight.copy_(weight)
        objective, nats = ours.cross_entropy(tp.local_rows(x_TD), labels_T, torch.ones(tokens, dtype=torch.bool))
        objective.backward()
        torch.testing.assert_close(torch.stack([objective, nats]), torch.stack([their_loss] * 2))
        torch.testing.assert_close(ours.weight.grad, their_gradient, rtol=1e-4, atol=1e-5)
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize(("size", "sequence"), [(2, True), (4, False), (4, True)])
def test_embedding_and_cross_entropy_equal_megatron_cores(size: int, sequence: bool) -> None:
    run_ranks(size, vocabulary_and_megatrons, sequence)


@pytest.mark.parametrize("size", [2, 4])
def test_the_whole_model_equals_transformers(size: int) -> None:
    case = Case({"vocab_size": 101}, dtype=torch.float32, documents=1)
    whole = backward(build(case), case)
    peer = llama(build(case).config, whole.values)
    inputs = batch(documents=1)
    logits_TV = peer(inputs.tokens_T.view(2, -1)).logits.flatten(0, 1)
    nats = F.cross_entropy(logits_TV[inputs.counted_T], inputs.labels_T[inputs.counted_T], reduction="sum")
    (0.01 * nats).backward()
    gradients = {name: peer.get_parameter(llama_name(name)).grad for name in whole.values}
    for result in run_ranks(size, on_tensor_ranks, case):
        compare(result, nats.item(), gradients)


def compare(result: Result, nats: float, gradients: dict[str, Tensor]) -> None:
    assert result.sums == [pytest.approx(0.01 * nats, rel=1e-5), pytest.approx(nats, rel=1e-5)]
    for name, part in result.parts.items():
        ours = result.gradients[name][: part.size[0]]
        torch.testing.assert_close(ours, box(part, gradients[name]), rtol=1e-3, atol=1e-6, msg=name)
