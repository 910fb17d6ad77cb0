"""The presets against published totals, transformers' own models, and formulas from papers."""

from __future__ import annotations

from typing import Any

import pytest

from megalm.config.load import preset_model
from megalm.config.presets import PRESETS
from megalm.config.sections import Model
from megalm.model.counts import parameter_count

PUBLISHED = {  # from the models' safetensors indices and cards
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gpt2": 124_439_808,
}


def count(name: str) -> int:
    model = preset_model(name)
    assert model.vocab_size is not None
    return parameter_count(model, model.vocab_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    assert count(name) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "billions"), [("gpt3-175b", 175), ("megatron-1t", 1008)])
def test_gpt_presets_have_the_papers_number_of_parameters(name: str, billions: int) -> None:
    """Equation 2 of arXiv 2104.04473: P = 12 l h^2 (1 + 13 / 12h + (V + s) / 12lh), without the last LayerNorm."""
    model = preset_model(name)
    layers, width = model.num_layers, model.hidden_size
    assert model.vocab_size is not None
    assert model.max_positions is not None
    formula = 12 * layers * width**2 + 13 * layers * width + (model.vocab_size + model.max_positions) * width
    assert count(name) == formula + 2 * width
    assert round(count(name) / 1e9) == billions


def test_the_sizes_to_try_things_with_are_small() -> None:
    assert 3e6 < parameter_count(preset_model("llama-tiny"), 4096) < 6e6
    assert 18e6 < parameter_count(preset_model("llama-small"), 8192) < 22e6
    assert preset_model("llama-tiny").vocab_size is None


def hugging_face(model: Model) -> Any:
    """The same shape as a model of transformers, without memory for its weights."""
    import torch
    import transformers as hf

    shape: dict[str, Any] = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "intermediate_size": model.ffn_size,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if model.position == "learned":
        config: Any = hf.GPT2Config(
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_positions=model.max_positions,
            vocab_size=model.vocab_size,
        )
    elif model.qk_norm:
        config = hf.Qwen3Config(**shape, head_dim=model.head_dim)
    elif model.qkv_bias:
        config = hf.Qwen2Config(**shape)
    elif model.sliding_window:
        config = hf.MistralConfig(**shape)
    else:
        config = hf.LlamaConfig(**shape)
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "name", ["llama3-8b", "llama3-405b", "mistral-7b", "qwen2-7b", "qwen3-0.6b", "qwen3-8b", "gpt2"]
)
def test_a_preset_has_as_many_parameters_as_in_transformers(name: str) -> None:
    assert count(name) == sum(p.numel() for p in hugging_face(preset_model(name)).parameters())


def test_presets_say_how_their_models_compute() -> None:
    qwen, gpt, mistral = preset_model("qwen3-8b"), preset_model("gpt2"), preset_model("mistral-7b")
    assert (qwen.qk_norm, qwen.head_dim, qwen.rope_theta, qwen.norm_eps) == (True, 128, 1e6, 1e-6)
    assert (gpt.position, gpt.norm, gpt.activation, gpt.tie_embeddings) == ("learned", "layernorm", "gelu_tanh", True)
    assert mistral.sliding_window == 4096
    scaling = preset_model("llama3.1-8b").rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length) == (
        8,
        1,
        4,
        8192,
    )
    assert preset_model("llama3-8b").rope_scaling is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_no_key_twice_over(name: str) -> None:
    """What a preset says is not what the section says anyway, except for the nested rope scaling."""
    assert [k for k, v in PRESETS[name].items() if Model.model_fields[k].default == v] == []
