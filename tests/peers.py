"""Models to compare with transformers', and what our parameters are called there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor

from megalm.checkpoint.huggingface.architectures import LLAMA
from megalm.checkpoint.huggingface.names import their_name
from megalm.config.sections import Model
from megalm.model.init import initialise
from megalm.model.transformer import Transformer


def llama_name(name: str) -> str:
    """The name in transformers' Llama, Qwen and Mistral of our parameter `name`."""
    return their_name(name, LLAMA)


def randomised(config: Model) -> Transformer:
    """With large weights, and norms and biases off their initial ones and zeros."""
    model = Transformer(config)
    initialise(model, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 3
    return model


def our_logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """[B, S, V]."""
    batch, length = tokens_BS.shape
    positions_T = torch.arange(length).repeat(batch)
    ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return model.logits(model.hidden(tokens_BS.flatten(), positions_T, ends)).view(batch, length, -1)


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
