"""Small models of every architecture that can be exported, and their ways out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peers import randomised

from megalm.checkpoint.weights import save_model
from megalm.config.sections import Model, RopeScaling
from megalm.model.transformer import Transformer
from megalm.train.exchange import export

BASE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 176,
    "vocab_size": 211, "max_positions": 128,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "num_kv_heads": 8, "position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "qkv_bias": True,
    "attention_bias": True, "ffn_bias": True,
}  # fmt: skip
TIED = {"tie_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, tied, all heads": ("LlamaForCausalLM", {**TIED, "num_kv_heads": 8}),
    "llama, wide heads": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama, biases": ("LlamaForCausalLM", {"qkv_bias": True, "attention_bias": True, "ffn_bias": True}),
    "llama 3": (
        "LlamaForCausalLM",
        {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8.0, original_length=32), "norm_eps": 1e-6},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 20}),
    "mistral, tied": ("MistralForCausalLM", {**TIED, "sliding_window": 20}),
    "qwen 2": ("Qwen2ForCausalLM", {"qkv_bias": True, "rope_theta": 1e6}),
    "qwen 2, tied": ("Qwen2ForCausalLM", {**TIED, "qkv_bias": True}),
    "qwen 2, window": ("Qwen2ForCausalLM", {"qkv_bias": True, "sliding_window": 20}),
    "qwen 3": ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 16}),
    "qwen 3, tied": ("Qwen3ForCausalLM", {**TIED, "qk_norm": True}),
    "qwen 3, window, biases": (
        "Qwen3ForCausalLM",
        {"qk_norm": True, "sliding_window": 20, "qkv_bias": True, "attention_bias": True},
    ),
    "gpt 2": ("GPT2LMHeadModel", {**GPT2, **TIED}),
    "gpt 2, untied, exact gelu": ("GPT2LMHeadModel", {**GPT2, "activation": "gelu"}),
}


def small(name: str) -> Transformer:
    return randomised(Model(**{**BASE, **MODELS[name][1]}))


def saved(model: Transformer, directory: Path) -> Path:
    """A checkpoint of the model alone."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return save_model(directory / "checkpoints", model.config, tensors, "a test")


def exported(model: Transformer, directory: Path, dtype: str = "float32", shard_bytes: int = 10**9) -> Path:
    """The model in Hugging Face's form."""
    export(saved(model, directory / "run"), directory / "hf", None, 1, dtype, shard_bytes, ignore, ignore)
    return directory / "hf"


def ignore(*_: object) -> None:
    pass


def tokens() -> torch.Tensor:
    return torch.randint(211, (3, 48), generator=torch.Generator().manual_seed(2))
