from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalm.config.sections import Model
from megalm.model.counts import parameter_count, seen_pairs, training_flops
from megalm.model.init import initialise, normal_rows
from megalm.model.transformer import ModelInputs, Transformer
from megalm.ops.attention import reference_attention
from megalm.ops.cross_entropy import reference_cross_entropy

SHAPE = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 80,
    "vocab_size": 97, "max_positions": 64,
}  # fmt: skip
VARIANTS = {
    "llama": {},
    "qwen 3": {"qk_norm": True, "tie_embeddings": True},
    "gpt": {
        "norm": "layernorm", "activation": "gelu", "position": "learned", "qkv_bias": True, "attention_bias": True,
        "ffn_bias": True,
    },
    "capped": {"sliding_window": 9, "attention_softcap": 20.0, "logit_softcap": 10.0, "z_loss": 1e-4},
    "sinks": {"attention": "fused_softmax", "attention_sinks": True, "sliding_window": 9},
}  # fmt: skip


def build(dtype: torch.dtype = torch.float64, recompute: str = "none", **changes) -> Transformer:
    model = Transformer(Model(**{**SHAPE, **changes}), dtype, recompute)
    initialise(model, seed=3)
    return model.to(torch.float64) if dtype == torch.float64 else model


def documents(lengths: list[int]) -> ModelInputs:
    total = sum(lengths)
    tokens_T = torch.randint(97, (total,), generator=torch.Generator().manual_seed(total))
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    segments = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ModelInputs(tokens_T, positions_T, segments, tokens_T.roll(-1), torch.ones(total, dtype=torch.bool))


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_side_by_side_equal_documents_alone(variant: str) -> None:
    model = build(**VARIANTS[variant])
    tokens_T, positions_T, segments, *_ = documents([20, 1, 33, 10])
    together = model.hidden(tokens_T, positions_T, segments)
    for start, end in zip(segments[:-1].tolist(), segments[1:].tolist(), strict=True):
        alone = model.hidden(tokens_T[start:end], positions_T[start:end], torch.tensor([0, end - start]))
        torch.testing.assert_close(together[start:end], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(variant: str, recompute: str) -> None:
    results = []
    for mode in ("none", recompute):
        model = build(torch.float32, mode, **VARIANTS[variant])
        objective, _ = model(documents([40, 24]))
        objective.backward()
        results.append([objective, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_keeps_less(recompute: str) -> None:
    kept = {}
    for mode in ("none", recompute):
        model = build(torch.float32, mode)
        sizes: dict[int, int] = {}
        parameters = {p.data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor, sizes: dict[int, int] = sizes, parameters: set[int] = parameters) -> torch.Tensor:
            if x.data_ptr() not in parameters:
                sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            objective, _ = model(documents([40, 24]))
        kept[mode] = sum(sizes.values())
        objective.backward()
    assert kept[recompute] < 0.7 * kept["none"]


def test_compiled_blocks_equal_eager_ones() -> None:
    results = []
    for compiled in (False, True):
        model = build(torch.float32, num_layers=1)
        if compiled:
            for block in model.layers.values():
                block.compile()
        objective, _ = model(documents([40, 24]))
        objective.backward()
        results.append([objective, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_close_and_keeps_float32_parameters_and_gradients() -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(dtype)
        objective, cross_entropy = model(documents([40, 24]))
        objective.backward()
        assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
        losses.append(cross_entropy.item() / 64)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_losss_settings_reach_it() -> None:
    batch = documents([40, 24])
    both = {"z_loss": 0.1, "logit_softcap": 0.3}
    for settings in ({"z_loss": 0.1}, {"logit_softcap": 0.3}, both, {"label_smoothing": 0.2}):
        model = build(**settings)
        x_TD = model.hidden(*batch[:3])
        options = [settings.get("z_loss", 0.0), settings.get("logit_softcap"), settings.get("label_smoothing", 0.0)]
        wanted = reference_cross_entropy(x_TD, model.output.weight, *batch[3:5], *options)
        for a, b in zip(model(batch), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert (model.logits(x_TD).abs().max() < 0.3) == ("logit_softcap" in settings)


def test_attentions_settings_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = documents([40, 24])[:3]
    configured = build(sliding_window=9, attention_softcap=0.1).hidden(*batch)
    assert not torch.allclose(configured, build(sliding_window=9).hidden(*batch), rtol=1e-6)

    def with_settings(q, k, v, segments, *_):
        return reference_attention(q, k, v, segments, 9, 0.1)

    monkeypatch.setattr("megalm.model.transformer.attention", with_settings)
    torch.testing.assert_close(configured, build().hidden(*batch), rtol=1e-9, atol=1e-11)


def test_attention_by_our_softmax_is_attention_and_its_sinks_are_not() -> None:
    batch = documents([40, 24])
    for options in ({"sliding_window": 9}, {"attention_softcap": 0.1}):
        results = []
        for path in ("auto", "fused_softmax"):
            model = build(attention=path, **options)
            objective, _ = model(batch)
            objective.backward()
            results.append([objective, *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    model = build(attention="fused_softmax", attention_sinks=True)
    sinking = model.hidden(*batch[:3])
    assert not torch.allclose(sinking, build().hidden(*batch[:3]), rtol=1e-6)
    for block in model.layers.values():
        torch.nn.init.constant_(block.attention.sinks, -torch.inf)
    torch.testing.assert_close(model.hidden(*batch[:3]), build().hidden(*batch[:3]), rtol=1e-9, atol=1e-11)


def test_a_models_parameters_are_as_many_as_counted() -> None:
    for changes in VARIANTS.values():
        model = build(**changes)
        assert sum(p.numel() for p in model.parameters()) == parameter_count(model.config, 97)


def test_what_writes_to_the_residual_stream_starts_smaller() -> None:
    model = build(hidden_size=256, ffn_size=512, head_dim=64, num_layers=8, init_std=0.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            small = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            assert parameter.std().item() == pytest.approx(0.5 / 4 if small else 0.5, rel=0.05)


def test_initial_weights_depend_on_seed_name_and_global_index_only() -> None:
    whole = normal_rows(5, "layers.0.up.weight", 0, 1000, 8, 0.02)
    for first, count in ((0, 10), (250, 20), (300, 700), (999, 1), (256, 256)):
        assert torch.equal(normal_rows(5, "layers.0.up.weight", first, count, 8, 0.02), whole[first : first + count])
    assert not torch.equal(normal_rows(6, "layers.0.up.weight", 0, 10, 8, 0.02), whole[:10])
    assert not torch.equal(normal_rows(5, "layers.1.up.weight", 0, 10, 8, 0.02), whole[:10])
    assert whole.std() == pytest.approx(0.02, rel=0.05)
    shallow, deep = build(), build(num_layers=3)
    for name, parameter in shallow.named_parameters():
        if not name.endswith(("output.weight", "down.weight")):  # these are scaled by depth
            assert torch.equal(parameter, deep.get_parameter(name))


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_operations_equal_what_torch_counts(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The dense definition of attention, since torch's counter does not see into our operator.
    monkeypatch.setattr("megalm.model.transformer.attention", reference_attention)
    monkeypatch.setattr("megalm.model.transformer.softmax_attention", lambda *args: reference_attention(*args[:-1]))
    model = build(torch.float32, **VARIANTS[variant])
    with FlopCounterMode(display=False) as counter:
        model(documents([64]))[0].backward()
    assert counter.get_total_flops() == training_flops(model.config, tokens=64, pairs=64 * 64)


def test_seen_pairs_equal_a_slow_count() -> None:
    for window in (None, 1, 7, 100):
        slow = sum(min(i + 1, window or i + 1) for n in (5, 1, 30) for i in range(n))
        assert seen_pairs([0, 5, 6, 36], window) == slow
