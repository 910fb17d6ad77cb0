"""Evaluation: cross-entropy on given micro-batches as loss, perplexity and bits per byte, for each source.

    loss = nats / counted tokens      perplexity = e^loss      bits per byte = nats / ln 2 / bytes that the tokens spell

Bits per byte do not depend on the tokenizer, so they compare models with different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalm.config.sections import known
from megalm.data.dataset import Source
from megalm.data.loader import Loader, MicroBatch, shared_windows
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.train.build import model_inputs
from megalm.train.packed import GROUP
from megalm.train.passes import Passes
from megalm.train.trained import SavedModel


@dataclass(frozen=True)
class Score:
    """Sums over what was evaluated; the ratios that people read are derived."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def values(self) -> dict[str, Any]:
        """For metrics."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "evaluated_tokens": self.tokens,
            "evaluated_bytes": self.bytes,
        }


def score(passes: Passes, tokenizer: Tokenizer, batches: Iterable[MicroBatch]) -> Score:
    """The cross-entropy over all counted tokens of `batches`, of which all data ranks have as many; it counts on one of
    the ranks that give the same."""
    total, stream, device = Score(0.0, 0, 0), iter(batches), passes.mesh.device
    while group := list(islice(stream, GROUP)):
        nats = passes.run([model_inputs(batch, device) for batch in group], scale=None).item()
        if passes.predicts:
            labels = [batch.labels_T[batch.loss_mask_T].tolist() for batch in group]
            total += Score(nats, sum(map(len, labels)), sum(map(tokenizer.byte_length, labels)))
    return total


def score_sources(passes: Passes, tokenizer: Tokenizer, loader: Loader, micro_size: int) -> dict[str, Score]:
    """The score of each source's held-out samples by name, on all ranks of the mesh, which share them."""
    data = passes.mesh.data
    scores = [score(passes, tokenizer, batches) for _, batches in loader.validation(micro_size, data.rank, data.size)]
    return dict(zip(loader.source_names, _of_all_ranks(passes, scores), strict=True))


def _of_all_ranks(passes: Passes, scores: Sequence[Score]) -> list[Score]:
    """The sums over all ranks."""
    world = passes.mesh.world
    sums = torch.tensor([[s.nats, s.tokens, s.bytes] for s in scores], dtype=torch.float64, device=passes.mesh.device)
    if world.group is not None:
        dist.all_reduce(sums, group=world.group)
    return [Score(nats, round(tokens), round(size)) for nats, tokens, size in sums.tolist()]


def evaluation_line(step: int, tokens: int, scores: dict[str, Score]) -> dict[str, Any]:
    """The line of `metrics.jsonl` after `tokens` training tokens: all sources together, and each."""
    total = sum(scores.values(), Score(0.0, 0, 0)).values()
    sources = {name: part.values() for name, part in scores.items()}
    return {"kind": "evaluation", "step": step, "tokens": tokens, **total, "sources": sources}


@dataclass(frozen=True)
class Portion:
    """Of a prepared directory: `count` sequences from token `first` on."""

    source: Source
    what: str
    first: int
    count: int

    def __repr__(self) -> str:
        return f"{self.source.manifest.fingerprint} {self.first} {self.count}"


def portion(saved: SavedModel, directory: Path) -> Portion:
    """What the run held out if the directory's data is one of its sources, else the whole."""
    length = saved.config.data.sequence_length
    source = Source(directory.name, directory, saved.tokenizer.fingerprint)
    if source.manifest.fingerprint in saved.sources:
        samples, trained_length = saved.held_out
        split = source.split(trained_length, samples)
        start, end = (at * trained_length for at in (split.held_out_start, split.held_out_start + split.held_out))
        first = -(-start // length)  # sequences of another length begin and end inside
        found = Portion(source, "held out", first, max(0, end // length - first))
    else:
        found = Portion(source, "all", 0, (source.tokens - 1) // length)
    if found.count < 1:
        raise UserError(
            f"{directory}: nothing to evaluate: the run held out {saved.held_out[0]} samples of each source, and the "
            f"directory's {source.tokens} tokens make {(source.tokens - 1) // length} sequences of {length}"
        )
    return found


def score_portion(passes: Passes, saved: SavedModel, part: Portion) -> Score:
    """The score, on all ranks of the mesh, which share the sequences."""
    config, eod, data = saved.config, saved.tokenizer.eod, passes.mesh.data
    settings = (config.data.sequence_length, known(config.batch.micro_size), eod, config.model.document_attention)
    batches = shared_windows(part.source, 0, part.first, part.count, *settings, data.rank, data.size)
    return _of_all_ranks(passes, [score(passes, saved.tokenizer, batches)])[0]
