"""Evaluation: cross-entropy on given micro-batches as loss, perplexity and bits per byte, for each source.

    loss = nats / counted tokens      perplexity = e^loss      bits per byte = nats / ln 2 / bytes that the tokens spell

Bits per byte do not depend on the tokenizer, so they compare models with different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megalm.config.sections import known
from megalm.data.dataset import Source
from megalm.data.loader import MicroBatch, windows
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.model.transformer import Transformer
from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.plan import one_stage_plan
from megalm.train.build import model_inputs
from megalm.train.run_directory import TrainedModel

GROUP = 32  # micro-batches that one plan takes through the model


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


@torch.no_grad()
def score(model: Transformer, tokenizer: Tokenizer, batches: Iterable[MicroBatch]) -> Score:
    """The model's cross-entropy over all counted tokens of `batches`."""
    device = next(model.parameters()).device
    total, stream = Score(0.0, 0, 0), iter(batches)
    while group := list(islice(stream, GROUP)):
        total += _score_group(model, tokenizer, group, device)
    return total


def _score_group(model: Transformer, tokenizer: Tokenizer, group: list[MicroBatch], device: torch.device) -> Score:
    nats = torch.zeros((), dtype=torch.float64, device=device)

    def forward(stage: int, i: int, x_TD: torch.Tensor | None) -> torch.Tensor:
        _, cross_entropy = model(model_inputs(group[i], device))
        return nats.add_(cross_entropy)

    Executor(one_stage_plan(len(group), forward_only=True)[0], {}).step(forward)
    labels = [batch.labels_T[batch.loss_mask_T].tolist() for batch in group]
    return Score(nats.item(), sum(map(len, labels)), sum(map(tokenizer.byte_length, labels)))


def score_sources(
    model: Transformer, tokenizer: Tokenizer, sources: Iterable[tuple[str, Iterable[MicroBatch]]]
) -> dict[str, Score]:
    """The score of each source by name."""
    return {name: score(model, tokenizer, batches) for name, batches in sources}


def evaluation_line(step: int, tokens: int, scores: dict[str, Score]) -> dict[str, Any]:
    """The line of `metrics.jsonl` after `tokens` training tokens: all sources together, and each."""
    total = sum(scores.values(), Score(0.0, 0, 0)).values()
    sources = {name: part.values() for name, part in scores.items()}
    return {"kind": "evaluation", "step": step, "tokens": tokens, **total, "sources": sources}


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate_directory` looked at, and the score."""

    part: str
    sequences: int
    score: Score


def evaluate_directory(trained: TrainedModel, directory: Path) -> Evaluated:
    """The score on a prepared directory: on what the run held out if the directory's data is one of its sources, else
    on the whole."""
    config, tokenizer = trained.config, trained.tokenizer
    length, held_out = config.data.sequence_length, config.data.validation.samples
    source = Source(directory.name, directory, tokenizer.fingerprint)
    if source.manifest.fingerprint in trained.sources:
        split = source.split(length, held_out)
        part, first, count = "held out", split.held_out_start, split.held_out
    else:
        part, first, count = "all", 0, (source.tokens - 1) // length
    if count < 1:
        raise UserError(
            f"{directory}: nothing to evaluate: the run held out {held_out} samples of each source, and the "
            f"directory's {source.tokens} tokens make {(source.tokens - 1) // length} sequences of {length}"
        )
    micro_size = known(config.batch.micro_size)
    batches = windows(source, 0, first, count, length, micro_size, tokenizer.eod, config.model.document_attention)
    return Evaluated(part, count, score(trained.model, tokenizer, batches))
