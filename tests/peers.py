"""What our parameters are called elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import transformers
from torch import Tensor

from megalm.config.sections import Model

LLAMA_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
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


def llama_name(name: str) -> str:
    """The name in transformers' Llama, Qwen and Mistral of our parameter `name`."""
    if name in LLAMA_NAMES:
        return LLAMA_NAMES[name]
    _, number, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"model.layers.{number}.{LLAMA_NAMES[module]}.{kind}"


def llama(shape: Model, values: Mapping[str, Tensor]) -> transformers.LlamaForCausalLM:
    """transformers' Llama of this shape with the values of our parameters."""
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            intermediate_size=shape.ffn_size,
            vocab_size=shape.vocab_size,
            rms_norm_eps=shape.norm_eps,
            attn_implementation="eager",
        )
    )
    peer.load_state_dict({llama_name(name): value.detach().clone() for name, value in values.items()}, strict=True)
    return peer
