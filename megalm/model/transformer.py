"""The decoder-only transformer, written once. Llama, Qwen, Mistral and GPT shapes are configurations of it.

    tokens -> embedding -> [x + attention(norm(x)) -> x + feed_forward(norm(x))] * L -> norm -> head (with the loss)

Activations are token-major: a micro-batch of B sequences of S tokens is T = B * S rows, and `segments` says where
documents end. Parameter names hold the global layer number, so they do not depend on how layers are spread: a pipeline
rank builds the stages that it holds and no more. On several tensor ranks each has some heads, some of the feed-forward
layer and some of the vocabulary; with sequence sharding, between these it has R = T / ranks rows (else R = T).

Shapes: T tokens, R rows of this rank, D hidden, H query heads, K key/value heads, E head dim, F feed-forward, V
vocabulary; of H, K, F and V those of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megalm.config.sections import Model, known
from megalm.model.layers import LayerNorm, PositionEmbedding, RMSNorm
from megalm.ops import native
from megalm.ops.attention import Segments, attention, attention_to_cache
from megalm.ops.dropout import dropout, row_keys
from megalm.ops.rotary import apply_rotary, llama3_scaled, rotary_frequencies, rotary_tables
from megalm.ops.softmax_attention import softmax_attention, softmax_attention_to_cache
from megalm.parallel.part import Part
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.tensor.linear import ColumnLinear, RowLinear, column
from megalm.parallel.tensor.vocabulary import VocabularyMatrix

Rotary = tuple[Tensor, Tensor]
Recompute = Literal["none", "selective", "full"]


class ModelInputs(NamedTuple):
    """A micro-batch as the model reads it: the same on every tensor rank and in every stage."""

    tokens_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, from 0 in each document."""
    ends: Tensor
    """int32: cumulative ends of the documents, `[0, ..., T]`; may stay on the CPU."""
    labels_T: Tensor | None
    """int64: the token after each; None where no loss is wanted."""
    counted_T: Tensor | None
    """bool: which tokens' losses count."""
    keys_B: Tensor | None = None
    """int64, the sequences' `megalm.ops.dropout.sequence_keys`; None drops nothing, as in evaluation."""
    caches: Sequence[Cache] | None = None
    """One a document, which hold what came before these tokens, and then hold these, too: for generation."""


@dataclass(frozen=True)
class Stage:
    """A part of the model: some layers, and what comes before and after all layers if it `embeds` or `predicts`."""

    first_layer: int
    end_layer: int
    embeds: bool
    predicts: bool


class Context(NamedTuple):
    """What all blocks need of a micro-batch."""

    segments: Segments
    rotary: Rotary | None = None
    keys_R: Tensor | None = None
    """For dropout, of this rank's rows."""


@dataclass
class LayerCache:
    """The keys and values that one layer has of one document, for this rank's heads."""

    kept: Tensor | None = None
    """[2, capacity, K, E], keys before values, of which `length` rows are filled."""
    length: int = 0

    def append(self, k_IKE: Tensor, v_IKE: Tensor) -> tuple[Tensor, Tensor]:
        """Adds I tokens; returns all keys and values so far."""
        end = self.length + len(k_IKE)
        if self.kept is None or end > self.kept.shape[1]:  # doubled, so that a row is moved once, on average
            grown = k_IKE.new_empty(2, 2 * end, *k_IKE.shape[1:])
            if self.kept is not None:
                grown[:, : self.length] = self.kept[:, : self.length]
            self.kept = grown
        self.kept[0, self.length : end], self.kept[1, self.length : end] = k_IKE, v_IKE
        self.length = end
        return self.kept[0, :end], self.kept[1, :end]


@dataclass
class Cache:
    """The keys and values that a rank's layers have of one document, by the layers' numbers."""

    layers: dict[str, LayerCache] = field(default_factory=dict)

    def of(self, layer: str) -> LayerCache:
        return self.layers.setdefault(layer, LayerCache())


KEPT = {  # by selective recomputation: what is slow to compute or to send again
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.megalm.blocked_attention.default,
    torch.ops.megalm.softmax_attention.default,
    torch.ops.megalm.cpu_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops.megalm.scatter_sum.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Keeps the results of matrix products, attention and sums over ranks; all else is computed again."""
    return create_selective_checkpoint_contexts(list(KEPT))


def norm_layer(config: Model, tp: TensorParallel) -> RMSNorm | LayerNorm:
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(tp, config.hidden_size, config.norm_eps, partial=tp.sequence)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) within documents. Where there are fewer key/value heads than tensor
    ranks, neighbours hold the same one."""

    def __init__(self, config: Model, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        hidden, self.head_dim = config.hidden_size, known(config.head_dim)
        q_width, kv_width = config.num_heads * self.head_dim, known(config.num_kv_heads) * self.head_dim
        copies = max(1, tp.axis.size // known(config.num_kv_heads))
        self.query = ColumnLinear(tp, hidden, q_width, config.qkv_bias)
        self.key = ColumnLinear(tp, hidden, kv_width, config.qkv_bias, copies)
        self.value = ColumnLinear(tp, hidden, kv_width, config.qkv_bias, copies)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = RMSNorm(tp, self.head_dim, config.norm_eps, partial=True)
            self.key_norm = RMSNorm(tp, self.head_dim, config.norm_eps, partial=True)
        self.output = RowLinear(tp, q_width, hidden, config.attention_bias)
        self.window, self.softcap = config.sliding_window, config.attention_softcap
        self.fused_softmax, self.sinks = config.attention == "fused_softmax", None
        if config.attention_sinks:
            self.parts = {"sinks": tp.part((config.num_heads,), 0)}
            self.sinks = nn.Parameter(torch.empty(self.parts["sinks"].size))

    def forward(self, x_RD: Tensor, context: Context, caches: Sequence[LayerCache] | None = None) -> Tensor:
        projected = column(x_RD, [self.query, self.key, self.value], self.tp)
        q_THE, k_TKE, v_TKE = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if self.query_norm is not None and self.key_norm is not None:
            q_THE, k_TKE = self.query_norm(q_THE), self.key_norm(k_TKE)
        if context.rotary is not None:
            q_THE, k_TKE = apply_rotary(q_THE, context.rotary), apply_rotary(k_TKE, context.rotary)
        options = (self.window, self.softcap, self.sinks) if self.fused_softmax else (self.window, self.softcap)
        if caches is None:
            attend = softmax_attention if self.fused_softmax else attention
            out_THE = attend(q_THE, k_TKE, v_TKE, context.segments, *options)
        else:
            out_THE = self._attend_to_caches(q_THE, k_TKE, v_TKE, caches, context.segments, *options)
        return self.output(out_THE.flatten(1))

    def _attend_to_caches(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        caches: Sequence[LayerCache],
        segments: Segments,
        *options: Any,
    ) -> Tensor:
        """Where all documents begin here, as without caches; else one after the other."""
        begin = all(cache.length == 0 for cache in caches)
        parts = list(pairwise(segments.ends.tolist()))
        seen = [cache.append(k_TKE[a:b], v_TKE[a:b]) for cache, (a, b) in zip(caches, parts, strict=True)]
        if begin:
            return (softmax_attention if self.fused_softmax else attention)(q_THE, k_TKE, v_TKE, segments, *options)
        attend = softmax_attention_to_cache if self.fused_softmax else attention_to_cache
        return torch.cat([attend(q_THE[a:b], *kv, *options) for kv, (a, b) in zip(seen, parts, strict=True)])


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), or two matrices with GELU between."""

    def __init__(self, config: Model, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        gated = config.activation == "swiglu"
        self.gate = ColumnLinear(tp, config.hidden_size, config.ffn_size, config.ffn_bias) if gated else None
        self.up = ColumnLinear(tp, config.hidden_size, config.ffn_size, config.ffn_bias)
        self.down = RowLinear(tp, config.ffn_size, config.hidden_size, config.ffn_bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x_RD: Tensor) -> Tensor:
        if self.gate is not None:
            gate_TF, up_TF = column(x_RD, [self.gate, self.up], self.tp)
            return self.down(F.silu(gate_TF) * up_TF)
        (up_TF,) = column(x_RD, [self.up], self.tp)
        return self.down(F.gelu(up_TF, approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm transformer block `number`, with its activations kept or computed again as `recompute` says."""

    def __init__(self, config: Model, number: int, recompute: Recompute, tp: TensorParallel) -> None:
        super().__init__()
        self.number, self.recompute, self.dropout = number, recompute, config.dropout
        self.attention_norm = norm_layer(config, tp)
        self.attention = Attention(config, tp)
        self.feed_forward_norm = norm_layer(config, tp)
        self.feed_forward = FeedForward(config, tp)

    def forward(self, x_RD: Tensor, context: Context, caches: Sequence[LayerCache] | None = None) -> Tensor:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(x_RD, context, caches)
        recomputed = partial(checkpoint, self.compute, x_RD, context, use_reentrant=False)
        # torch.compile takes `context_fn` for selective recomputation only.
        return recomputed(context_fn=selective_contexts) if self.recompute == "selective" else recomputed()

    def compute(self, x_RD: Tensor, context: Context, caches: Sequence[LayerCache] | None = None) -> Tensor:
        y_RD = self.attention(self.attention_norm(x_RD), context, caches)
        x_RD = x_RD + dropped(y_RD, context, 2 * self.number + 1, self.dropout)
        y_RD = self.feed_forward(self.feed_forward_norm(x_RD))
        return x_RD + dropped(y_RD, context, 2 * self.number + 2, self.dropout)


def dropped(x_RD: Tensor, context: Context, site: int, rate: float) -> Tensor:
    """Dropout where there is any: site 0 is the embedding, each block has two."""
    return x_RD if context.keys_R is None else dropout(x_RD, context.keys_R, site, rate)


class Transformer(nn.Module):
    """One stage of the model, or with no `stage` the whole. `config.vocab_size` must be set. Parameters are
    uninitialised: see `megalm.model.init`."""

    def __init__(
        self,
        config: Model,
        compute: torch.dtype = torch.float32,
        recompute: Recompute = "none",
        tp: TensorParallel | None = None,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        tp = tp or TensorParallel()
        stage = stage or Stage(0, config.num_layers, True, True)
        self.config, self.compute, self.tp, self.stage = config, compute, tp, stage
        vocabulary, width = known(config.vocab_size), config.hidden_size
        self.embedding = self.position_embedding = self.final_norm = self.head = None
        if stage.embeds or (stage.predicts and config.tie_embeddings):
            self.embedding = VocabularyMatrix(tp, vocabulary, width, primary=stage.embeds)
        if stage.embeds and config.position == "learned":
            self.position_embedding = PositionEmbedding(tp, known(config.max_positions), width)
        numbers = range(stage.first_layer, stage.end_layer)
        self.layers = nn.ModuleDict({str(i): Block(config, i, recompute, tp) for i in numbers})
        if stage.predicts:
            self.final_norm = norm_layer(config, tp)
            self.head = None if config.tie_embeddings else VocabularyMatrix(tp, vocabulary, width)
        self.parts: dict[str, Part] = {
            f"{module_name}.{name}": part
            for module_name, module in self.named_modules()
            if module_name
            for name, part in getattr(module, "parts", {}).items()
        }
        """What this rank holds of each parameter, by its name."""

    @property
    def output(self) -> VocabularyMatrix:
        """The output matrix, the embedding's where it is tied."""
        matrix = self.embedding if self.config.tie_embeddings else self.head
        assert matrix is not None, "this stage does not predict"
        return matrix

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        ends: Tensor,
        caches: Sequence[Cache] | None = None,
        keys_B: Tensor | None = None,
        x_RD: Tensor | None = None,
    ) -> Tensor:
        """x_RD in the compute type after the stage's layers, and after the last norm if it predicts; a stage that does
        not embed goes on from `x_RD`."""
        context = self._context(tokens_T, positions_T, ends, keys_B)
        if self.embedding is not None and self.stage.embeds:
            x_RD = self.embedding(tokens_T, self.compute)
            if self.position_embedding is not None:
                x_RD = x_RD + self.position_embedding(self.tp.local_rows(positions_T), self.compute)
            x_RD = dropped(x_RD, context, 0, self.config.dropout)
        assert x_RD is not None, "a stage that does not embed needs what the one before it gave"
        for number, block in self.layers.items():
            x_RD = block(x_RD, context, None if caches is None else [cache.of(number) for cache in caches])
        return x_RD if self.final_norm is None else self.final_norm(x_RD)

    def _context(self, tokens_T: Tensor, positions_T: Tensor, ends: Tensor, keys_B: Tensor | None) -> Context:
        rotary = keys_R = None
        if self.config.position == "rope":
            rotary = rotary_tables(positions_T, self.frequencies(positions_T.device), self.compute)
        if keys_B is not None and self.config.dropout:
            keys_R = self.tp.local_rows(row_keys(keys_B, len(tokens_T) // len(keys_B)))
        return Context(Segments.of(ends, tokens_T.device), rotary, keys_R)

    def forward(
        self, batch: ModelInputs, x_RD: Tensor | None = None, scale: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A stage that predicts gives sums over the counted tokens, the same on every tensor rank: (objective times
        `scale`, to differentiate; cross-entropy in nats). Any other, and any if there are no labels, gives x_RD."""
        x_RD = self.hidden(batch.tokens_T, batch.positions_T, batch.ends, batch.caches, batch.keys_B, x_RD)
        if not self.stage.predicts or batch.labels_T is None:
            return x_RD
        return self.output.cross_entropy(
            x_RD,
            batch.labels_T,
            known(batch.counted_T),
            z_loss=self.config.z_loss,
            softcap=self.config.logit_softcap,
            smoothing=self.config.label_smoothing,
            scale=scale,
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """Output logits [T, vocabulary] in float32 (or wider), all of them on every tensor rank; without gradient where
        there are several."""
        logits_TV = self.output.logits(x_TD)
        logits_TV = logits_TV.to(native.wide(logits_TV))
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
