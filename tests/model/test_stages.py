"""A model cut into stages is the whole model."""

from __future__ import annotations

import pytest
import torch

from megalm.config.sections import Model
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Stage, Transformer

SHAPE = {
    "num_layers": 4, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 80,
    "vocab_size": 97, "max_positions": 64,
}  # fmt: skip
STAGES = [Stage(0, 1, True, False), Stage(1, 1, False, False), Stage(1, 3, False, False), Stage(3, 4, False, True)]


def build(config: Model, stage: Stage | None = None) -> Transformer:
    model = Transformer(config, torch.float64, stage=stage)
    initialise(model, seed=3)
    return model.double()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_stages_one_after_the_other_are_the_whole_model_bit_for_bit(tied: bool, position: str) -> None:
    config = Model(**SHAPE, tie_embeddings=tied, position=position, dropout=0.1)
    tokens_T = torch.arange(64) * 7 % 97
    positions_T = torch.arange(32).repeat(2)
    ends = torch.tensor([0, 32, 64], dtype=torch.int32)
    counted_T = torch.ones(64, dtype=torch.bool)
    batch = ModelInputs(tokens_T, positions_T, ends, tokens_T.roll(-1), counted_T, torch.tensor([5, 6]))

    whole = build(config)
    wanted = whole(batch, scale=0.1)
    wanted[0].backward()

    stages = [build(config, stage) for stage in STAGES]
    x_TD, received = None, []
    for stage in stages[:-1]:
        x_TD = stage(batch, x_TD).detach().requires_grad_()
        received.append(x_TD)
    objective, cross_entropy = stages[-1](batch, x_TD, scale=0.1)
    assert torch.equal(objective, wanted[0])
    assert torch.equal(cross_entropy, wanted[1])
    objective.backward()
    for i in reversed(range(len(stages) - 1)):
        stages[i](batch, received[i - 1] if i else None).backward(received[i].grad)

    gradients: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, whole.get_parameter(name))
            gradients[name] = gradients.get(name, 0) + parameter.grad
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients.pop(name), parameter.grad, rtol=1e-15, atol=0, msg=name)
    assert not gradients


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_owned_by_one_stage_and_a_tied_copy_is_not_counted(tied: bool) -> None:
    config = Model(**SHAPE, tie_embeddings=tied)
    with torch.device("meta"):
        whole = Transformer(config)
        stages = [Transformer(config, stage=stage) for stage in STAGES]
    primary = [name for stage in stages for name, part in stage.parts.items() if part.primary]
    assert sorted(primary) == sorted(whole.parts) == sorted(name for name, _ in whole.named_parameters())
    copies = [name for stage in stages for name, part in stage.parts.items() if not part.primary]
    assert copies == (["embedding.weight"] if tied else [])
