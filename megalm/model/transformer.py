"""The decoder-only transformer, written once. Llama, Qwen, Mistral and GPT shapes are configurations of it.

    tokens -> embedding -> [x + attention(norm(x)) -> x + feed_forward(norm(x))] * L -> norm -> head (with the loss)

Activations are token-major: a micro-batch of B sequences of S tokens is T = B * S rows, and `segments` says where
documents end. Parameter names hold the global layer number, so they do not depend on how layers are spread.

Shapes: T tokens, D hidden, H query heads, K key/value heads, E head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megalm.config.sections import Model, known
from megalm.model.layers import Embedding, LayerNorm, Linear, RMSNorm
from megalm.ops.attention import Segments, attention, attention_to_cache
from megalm.ops.cross_entropy import linear_cross_entropy
from megalm.ops.rotary import apply_rotary, llama3_scaled, rotary_frequencies, rotary_tables

Rotary = tuple[Tensor, Tensor]
Recompute = Literal["none", "selective", "full"]


@dataclass
class LayerCache:
    """Keys and values that one layer has seen, one document: [capacity, K, E], of which `length` rows are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, k_IKE: Tensor, v_IKE: Tensor) -> tuple[Tensor, Tensor]:
        """Adds I tokens; returns all keys and values so far."""
        end = self.length + len(k_IKE)
        self.keys[self.length : end], self.values[self.length : end] = k_IKE, v_IKE
        self.length = end
        return self.keys[:end], self.values[:end]


KEPT = {  # by selective recomputation: what is slow to compute again
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.megalm.blocked_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Keeps the results of matrix products and attention; norms, activations and rotations are computed again."""
    return create_selective_checkpoint_contexts(list(KEPT))


def norm_layer(config: Model, width: int) -> RMSNorm | LayerNorm:
    return (RMSNorm if config.norm == "rmsnorm" else LayerNorm)(width, config.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) within documents."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, known(config.head_dim)
        q_width, kv_width = config.num_heads * self.head_dim, known(config.num_kv_heads) * self.head_dim
        self.query = Linear(hidden, q_width, config.qkv_bias)
        self.key = Linear(hidden, kv_width, config.qkv_bias)
        self.value = Linear(hidden, kv_width, config.qkv_bias)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.output = Linear(q_width, hidden, config.attention_bias)
        self.window, self.softcap = config.sliding_window, config.attention_softcap

    def forward(
        self, x_TD: Tensor, rotary: Rotary | None, segments: Segments, cache: LayerCache | None = None
    ) -> Tensor:
        q_THE = self.query(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKE = self.key(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKE = self.value(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q_THE, k_TKE = self.query_norm(q_THE), self.key_norm(k_TKE)
        if rotary is not None:
            q_THE, k_TKE = apply_rotary(q_THE, rotary), apply_rotary(k_TKE, rotary)
        if cache is None:
            out_THE = attention(q_THE, k_TKE, v_TKE, segments, self.window, self.softcap)
        else:
            out_THE = attention_to_cache(q_THE, *cache.append(k_TKE, v_TKE), self.window, self.softcap)
        return self.output(out_THE.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), or two matrices with GELU between."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.gate = Linear(config.hidden_size, config.ffn_size, config.ffn_bias) if gated else None
        self.up = Linear(config.hidden_size, config.ffn_size, config.ffn_bias)
        self.down = Linear(config.ffn_size, config.hidden_size, config.ffn_bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))
        return self.down(F.gelu(self.up(x_TD), approximate=self.approximate))


class Block(nn.Module):
    """One pre-norm transformer block, with its activations kept or computed again as `recompute` says."""

    def __init__(self, config: Model, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.attention_norm = norm_layer(config, config.hidden_size)
        self.attention = Attention(config)
        self.feed_forward_norm = norm_layer(config, config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_TD: Tensor, rotary: Rotary | None, segments: Segments, cache: LayerCache | None = None
    ) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x_TD, rotary, segments, cache)
        recomputed = partial(checkpoint, self.compute, x_TD, rotary, segments, use_reentrant=False)
        # torch.compile takes `context_fn` for selective recomputation only.
        return recomputed(context_fn=selective_contexts) if self.recompute == "selective" else recomputed()

    def compute(
        self, x_TD: Tensor, rotary: Rotary | None, segments: Segments, cache: LayerCache | None = None
    ) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, segments, cache)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Transformer(nn.Module):
    """The whole model. `config.vocab_size` must be set. Parameters are uninitialised: see `megalm.model.init`."""

    def __init__(self, config: Model, compute: torch.dtype = torch.float32, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config, self.compute = config, compute
        self.embedding = Embedding(known(config.vocab_size), config.hidden_size)
        self.position_embedding = None
        if config.position == "learned":
            self.position_embedding = Embedding(known(config.max_positions), config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, recompute) for i in range(config.num_layers)})
        self.final_norm = norm_layer(config, config.hidden_size)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, known(config.vocab_size), bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D], the embedding's where it is tied."""
        return (self.head or self.embedding).weight

    def hidden(
        self, tokens_T: Tensor, positions_T: Tensor, ends: Tensor, caches: list[LayerCache] | None = None
    ) -> Tensor:
        """x_TD after the last norm, in the compute type. `ends`: cumulative ends of the documents, `[0, ..., T]`."""
        segments = Segments.of(ends, tokens_T.device)
        x_TD = self.embedding(tokens_T, self.compute)
        rotary = None
        if self.position_embedding is not None:
            x_TD = x_TD + self.position_embedding(positions_T, self.compute)
        else:
            rotary = rotary_tables(positions_T, self.frequencies(positions_T.device), self.compute)
        for number, block in enumerate(self.layers.values()):
            x_TD = block(x_TD, rotary, segments, caches[number] if caches is not None else None)
        return self.final_norm(x_TD)

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        ends: Tensor,
        labels_T: Tensor,
        counted_T: Tensor,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Sums over the counted tokens: (objective times `scale`, to differentiate; cross-entropy in nats)."""
        x_TD = self.hidden(tokens_T, positions_T, ends)
        z_loss, softcap = self.config.z_loss, self.config.logit_softcap
        return linear_cross_entropy(x_TD, self.head_weight, labels_T, counted_T, z_loss, softcap, scale)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Output logits [T, V] in float32 (or wider), for the few tokens that generation asks for."""
        logits_TV = F.linear(x_TD, self.head_weight.to(x_TD.dtype))
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        cap = self.config.logit_softcap
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)

    def frequencies(self, device: torch.device) -> Tensor:
        """Rotary frequencies [E/2], with the config's scaling."""
        frequencies = rotary_frequencies(known(self.config.head_dim), self.config.rope_theta)
        if scaling := self.config.rope_scaling:
            frequencies = llama3_scaled(
                frequencies,
                scaling.factor,
                scaling.low_freq_factor,
                scaling.high_freq_factor,
                scaling.original_length,
            )
        return frequencies.to(device)
