"""Model shapes by name: keys of the `model` section, which the section's own keys override.

The published ones are those of the models' `config.json` on Hugging Face, GPT-3's are Table 2.1 of arXiv 2005.14165 and
megatron-1t's the last row of Table 1 of arXiv 2104.04473. `max_positions` is given only where positions are learned:
with rotary ones it is derived from the sequence length.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

Preset = dict[str, Any]

_LLAMA3: Preset = {"num_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
_QWEN3: Preset = {
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "qk_norm": True,
    "norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
_GPT: Preset = {
    "tie_embeddings": True,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "position": "learned",
    "qkv_bias": True,
    "attention_bias": True,
    "ffn_bias": True,
}


def _shape(num_layers: int, hidden_size: int, num_heads: int, ffn_size: int, **others: Any) -> Preset:
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "ffn_size": ffn_size,
        **others,
    }


PRESETS: MappingProxyType[str, Preset] = MappingProxyType(
    {
        # Sizes to try things with; the vocabulary is the tokenizer's.
        # They start with about 1 / sqrt(hidden_size): with 0.02 they stay at unigram statistics for hundreds of steps.
        "llama-tiny": _shape(4, 256, 4, 768, num_kv_heads=2, tie_embeddings=True, init_std=0.05),
        "llama-small": _shape(8, 384, 6, 1024, init_std=0.05),
        # Published models.
        "llama2-7b": _shape(32, 4096, 32, 11008, vocab_size=32000),
        "llama3-8b": _shape(32, 4096, 32, 14336, **_LLAMA3),
        "llama3.1-8b": _shape(
            32,
            4096,
            32,
            14336,
            **_LLAMA3,
            rope_scaling={
                "kind": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_length": 8192,
            },
        ),
        "llama3-70b": _shape(80, 8192, 64, 28672, **_LLAMA3),
        "llama3-405b": _shape(126, 16384, 128, 53248, **_LLAMA3),
        "mistral-7b": _shape(32, 4096, 32, 14336, num_kv_heads=8, vocab_size=32000, sliding_window=4096),
        "qwen2-7b": _shape(
            28, 3584, 28, 18944, num_kv_heads=4, vocab_size=152064, qkv_bias=True, norm_eps=1e-6, rope_theta=1000000.0
        ),
        "qwen3-0.6b": _shape(28, 1024, 16, 3072, **_QWEN3, tie_embeddings=True),
        "qwen3-8b": _shape(36, 4096, 32, 12288, **_QWEN3),
        "gpt2": _shape(12, 768, 12, 3072, **_GPT, vocab_size=50257, max_positions=1024),
        # GPT-3 alternates dense and banded attention; here every layer is dense.
        "gpt3-175b": _shape(96, 12288, 96, 49152, **_GPT, vocab_size=50257, max_positions=2048),
        "megatron-1t": _shape(128, 25600, 160, 102400, **_GPT, vocab_size=51200, max_positions=2048),
    }
)
