"""Evaluation: cross-entropy on given micro-batches as loss, perplexity and bits per byte, for each source.

    loss = nats / counted tokens      perplexity = e^loss      bits per byte = nats / ln 2 / bytes that the tokens spell

Bits per byte do not depend on the tokenizer, so they compare models with different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megalm.config.sections import known
from megalm.data.dataset import Source
from megalm.data.loader import MicroBatch, windows
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.model.transformer import Transformer
from megalm.parallel.pipeline.executor import execute
from megalm.parallel.pipeline.plan import one_stage_plan
from megalm.train.build import model_inputs
from megalm.train.run_directory import load_model

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
        ratios = {name: getattr(self, name) for name in ("loss", "perplexity", "bits_per_byte")}
        return ratios | {name: value for name, value in asdict(self).items() if name != "nats"}


@torch.no_grad()
def score(model: Transformer, tokenizer: Tokenizer, batches: Iterable[MicroBatch]) -> Score:
    """The model's cross-entropy over all counted tokens of `batches`."""
    device = model.embedding.weight.device
    total, stream = Score(0.0, 0, 0), iter(batches)
    while group := list(islice(stream, GROUP)):
        total += _score_group(model, tokenizer, group, device)
    return total


def _score_group(model: Transformer, tokenizer: Tokenizer, group: list[MicroBatch], device: torch.device) -> Score:
    nats = torch.zeros((), dtype=torch.float64, device=device)

    def forward(i: int) -> torch.Tensor:
        _, cross_entropy = model(*model_inputs(group[i], device))
        return nats.add_(cross_entropy)

    execute(one_stage_plan(len(group), forward_only=True)[0], forward)
    labels = [batch.labels_T[batch.loss_mask_T].tolist() for batch in group]
    return Score(nats.item(), sum(map(len, labels)), sum(map(tokenizer.byte_length, labels)))


def score_sources(
    model: Transformer, tokenizer: Tokenizer, sources: Sequence[tuple[str, list[MicroBatch]]]
) -> dict[str, Score]:
    """The score of each source by name."""
    return {name: score(model, tokenizer, batches) for name, batches in sources}


def evaluation_line(step: int, tokens: int, scores: dict[str, Score]) -> dict[str, Any]:
    """The line of `metrics.jsonl` after `tokens` training tokens: all sources together, and each."""
    total = sum(scores.values(), Score(0.0, 0, 0)).values()
    total["evaluated_tokens"], total["evaluated_bytes"] = total.pop("tokens"), total.pop("bytes")
    sources = {name: part.values() for name, part in scores.items()}
    return {"kind": "evaluation", "step": step, "tokens": tokens, **total, "sources": sources}


def evaluate_command(checkpoint: Path, data: Sequence[Path]) -> None:
    """Prints a table of each prepared directory's score: of what the run held out where the directory is one of its
    sources, else of the whole."""
    config, tokenizer, model = load_model(checkpoint)
    length, held_out = config.data.sequence_length, config.data.validation.samples
    trained_on = {Path(source.path).resolve() for source in config.data.sources}
    micro_size = known(config.batch.micro_size)
    table = Table("source", "part", "sequences", "tokens", "loss", "perplexity", "bits/byte")
    scores = []
    for number, directory in enumerate(data):
        source = Source(directory.name, directory, tokenizer.fingerprint)
        if directory.resolve() in trained_on:
            split = source.split(length, held_out)
            part, first, count = "held out", split.held_out_start, split.held_out
        else:
            part, first, count = "all", 0, (source.tokens - 1) // length
        if count == 0:
            raise UserError(
                f"{directory}: nothing to evaluate: the run held out {held_out} samples, and the directory's "
                f"{source.tokens} tokens make {(source.tokens - 1) // length} sequences of {length}"
            )
        batches = windows(
            source, number, first, count, length, micro_size, tokenizer.eod, config.model.document_attention
        )
        result = score(model, tokenizer, batches)
        scores.append(result)
        _add_row(table, directory.name, part, count, result)
    if len(scores) > 1:
        _add_row(table, "together", "", 0, sum(scores, Score(0.0, 0, 0)))
    Console().print(table)


def _add_row(table: Table, name: str, part: str, sequences: int, result: Score) -> None:
    ratios = (f"{result.loss:.4f}", f"{result.perplexity:.2f}", f"{result.bits_per_byte:.4f}")
    table.add_row(name, part, f"{sequences:,}" if sequences else "", f"{result.tokens:,}", *ratios)
