"""Initial weights under every layout are those of one process."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from megalm.config.sections import Model
from megalm.model.init import initialise
from megalm.model.transformer import Transformer
from megalm.parallel.mesh import Layout, build_mesh
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel

CONFIG = Model(
    num_layers=1, hidden_size=24, num_heads=4, num_kv_heads=1, head_dim=8, ffn_size=1100, vocab_size=1031,
    max_positions=70, position="learned", norm="layernorm", ffn_bias=True,
)  # fmt: skip


def filled_after_sharding(layout: Layout) -> dict[str, tuple[Part, torch.Tensor]]:
    mesh = build_mesh(layout, torch.device("cpu"), timedelta(seconds=60), tensor_copies=layout.tensor)
    with torch.device("meta"):
        model = Transformer(CONFIG, tp=TensorParallel(mesh.tensor, sequence=True))
    if mesh.shards is not None:
        for module in (*model.layers.values(), model):
            fully_shard(module, mesh=mesh.shards["data_shard"])
    model.to_empty(device="cpu")
    initialise(model, 9)
    tensors = {n: p.full_tensor() if mesh.shards is not None else p.detach() for n, p in model.named_parameters()}
    return {name: (model.parts[name], tensors[name]) for name in tensors}


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(data_shard=3), Layout(data_shard=2, tensor=2)], ids=str)
def test_each_rank_fills_its_part_or_its_shard_of_it(layout: Layout) -> None:
    whole = Transformer(CONFIG)
    initialise(whole, 9)
    for parts in run_ranks(layout.size, filled_after_sharding, layout):
        assert parts.keys() == dict(whole.named_parameters()).keys()
        for name, (part, tensor) in parts.items():
            box = tuple(slice(o, o + s) for o, s in zip(part.offset, part.size, strict=True))
            assert torch.equal(tensor[: part.size[0]], whole.get_parameter(name)[box])
            assert not tensor[part.size[0] :].any()
