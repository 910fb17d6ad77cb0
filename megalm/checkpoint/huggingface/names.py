"""Our parameters and theirs: one tensor of theirs is one of ours, or in GPT-2 several, one below the other.

    layers.0.attention.query.weight  <->  model.layers.0.self_attn.q_proj.weight       Llama, Mistral, Qwen
    layers.0.attention.query.weight  \\
    layers.0.attention.key.weight     >  transformer.h.0.attn.c_attn.weight, transposed: GPT-2's matrices take rows
    layers.0.attention.value.weight  /
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megalm.checkpoint.huggingface.architectures import GPT, Architecture

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
GPT2_NAMES = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layers": "transformer.h",
    "attention_norm": "ln_1",
    "feed_forward_norm": "ln_2",
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
}
VOCABULARY = ("embedding.weight", "head.weight")  # those with a row a token


@dataclass(frozen=True)
class Entry:
    """A tensor of theirs, and those of ours that it holds, one below the other, `transposed` or not."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


def entries(ours: Iterable[str], architecture: Architecture) -> Iterator[Entry]:
    """All tensors of a model of this architecture with these parameters, in the order of ours."""
    gathered: dict[str, list[str]] = {}
    for name in sorted(ours, key=_order):
        gathered.setdefault(their_name(name, architecture), []).append(name)
    for theirs, parts in gathered.items():
        in_rows = architecture is GPT and theirs.endswith(".weight") and (".attn." in theirs or ".mlp." in theirs)
        yield Entry(theirs, tuple(parts), in_rows)


def _order(name: str) -> list[int | str]:
    """Layers by number, and queries, keys and values in this order, as GPT-2 has them below each other."""
    module = name.rpartition(".")[0]
    number = int(module.split(".")[1]) if module.startswith("layers.") else -1
    return [number, list(GPT2_NAMES).index(inside) if (inside := _inside(module)) in GPT2_NAMES else -1, name]


def _inside(module: str) -> str:
    """The module's name in its layer."""
    return module.split(".", 2)[2] if module.startswith("layers.") else module


def their_name(name: str, architecture: Architecture) -> str:
    """The name in transformers of our parameter `name`."""
    table = GPT2_NAMES if architecture is GPT else LLAMA_NAMES
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{table[module]}.{kind}"
    number = module.split(".")[1]
    return f"{table['layers']}.{number}.{table[_inside(module)]}.{kind}"
