"""Text from a model: one token after the other, with the keys and values of all earlier ones kept.

    prompts -> Writing each -> [next tokens of all that still write -> their texts] until a stop, an end or the limit

All prompts go through the model packed, each in its own segment (`megalm.train.packed`), on any layout; what a prompt
gives does not depend on the others. One rank draws a token, and all get it with the sum over ranks that `read` makes,
so that all of them know when a text ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor

from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.model.transformer import Cache
from megalm.train.lines import read_lines
from megalm.train.packed import Part, Row, read
from megalm.train.passes import Passes
from megalm.train.trained import SavedModel, TrainedModel

TOGETHER = 32  # prompts of a data rank that are written on together: their keys and values are kept


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    seed: int = 0
    stop: tuple[str, ...] = ()


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of the `top_k` likeliest and of the smallest set of likeliest tokens whose probabilities, among these,
    reach `top_p` (nucleus sampling, arXiv 1904.09751); temperature 0 takes the likeliest."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double().cpu()
    # The largest logit first becomes 0, so that no temperature, however small, divides to infinity.
    scaled_V = (logits_V - logits_V.max()) / sampling.temperature
    ordered_V, order_V = scaled_V.sort(descending=True, stable=True)
    probabilities_V = torch.softmax(ordered_V[: sampling.top_k or None], -1)
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    before_V[0] = -1.0  # the likeliest token is in every set
    probabilities_V = probabilities_V.where(before_V < sampling.top_p, 0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])


@dataclass
class Document:
    """What has been written so far, and what the model keeps of it."""

    number: int
    tokens: list[int]
    generator: torch.Generator
    cache: Cache = field(default_factory=Cache)
    read: int = 0
    """Tokens that the model has read."""


def document(number: int, tokens: Sequence[int], seed: int) -> Document:
    return Document(number, list(tokens), torch.Generator().manual_seed(seed))


def next_tokens(passes: Passes, documents: Sequence[Document], sampling: Sampling, vocab_size: int) -> list[int]:
    """Reads what is new in the documents; the token that follows in each. Only the first `vocab_size` rows of the head
    stand for tokens; a model may have more."""

    def judge(logits_CV: Tensor, rows: list[Row]) -> Tensor:
        drawn = [
            sample(logits_V, sampling, documents[part].generator)
            for logits_V, (part, _) in zip(logits_CV[:, :vocab_size], rows, strict=True)
        ]
        return torch.tensor(drawn, dtype=torch.float64)[:, None]

    parts = [Part(d.number, d.tokens[d.read :], 1, d.read, d.cache) for d in documents]
    found = read(passes, parts, judge, 1)
    for one in documents:
        one.read = len(one.tokens)
    return [round(token) for (token,) in found]


class Text:
    """What new tokens spell, piece by piece: characters that span tokens come whole, and what could be the beginning of
    a stop string is held back until it is known to be none."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.stopped = False
        self._ids = list(before)
        self._start, self._spelled = 0, len(before)  # as tokenizers treat a text's first token in their own way
        self._held = ""

    def add(self, token: int) -> str:
        """What may be shown now."""
        self._ids.append(token)
        piece = self._new()
        if piece.endswith("\ufffd"):  # a character's first bytes
            return ""
        self._start, self._spelled = self._spelled, len(self._ids)
        return self._show(piece)

    def end(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        shown = self._show(self._new())
        rest, self._held = ("" if self.stopped else self._held), ""
        return shown + rest

    def _new(self) -> str:
        known = self.tokenizer.decode(self._ids[self._start : self._spelled])
        return self.tokenizer.decode(self._ids[self._start :])[len(known) :]

    def _show(self, piece: str) -> str:
        self._held += piece
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((n for text in self.stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


class Piece(NamedTuple):
    """Of the text of a document; with the last one `end` says why: a `stop` string, the document's `end`, or the
    `length` that was asked for."""

    document: int
    text: str
    end: str | None


def write(passes: Passes, tokenizer: Tokenizer, documents: Sequence[Document], sampling: Sampling) -> Iterator[Piece]:
    """Goes on with all documents together; each token adds to its document, but the end of one."""
    texts = {d.number: Text(tokenizer, d.tokens, sampling.stop) for d in documents}
    writing = list(documents)
    for count in range(1, sampling.max_new_tokens + 1):
        drawn = next_tokens(passes, writing, sampling, tokenizer.vocab_size)
        going = []
        for one, token in zip(writing, drawn, strict=True):
            text = texts[one.number]
            shown, end = "", "end" if token == tokenizer.eod else None
            if end is None:
                one.tokens.append(token)
                shown = text.add(token)
                end = "stop" if text.stopped else "length" if count == sampling.max_new_tokens else None
            if end is not None and not text.stopped:
                shown += text.end()
                end = "stop" if text.stopped else end
            yield Piece(one.number, shown, end)
            if end is None:
                going.append(one)
        if not (writing := going):
            return


def continuations(trained: TrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Piece]:
    """What follows each prompt, of at least one token, piece by piece; a prompt's number is its place."""
    together = TOGETHER * trained.passes.mesh.data.size
    for first in range(0, len(prompts), together):
        some = enumerate(prompts[first : first + together], first)
        documents = [document(number, tokens, sampling.seed) for number, tokens in some]
        yield from write(trained.passes, trained.tokenizer, documents, sampling)


def encode_prompt(saved: SavedModel, where: str, prompt: str, max_new_tokens: int, before: int = 0) -> list[int]:
    """The prompt's tokens. Raises UserError if there are none, or too many after those `before` it."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} is not valid UTF-8: give it as text in the terminal's encoding") from None
    ids = saved.tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"{where} is empty: give at least one character to continue")
    limit, length = saved.positions, before + len(ids)
    if length > limit:
        raise UserError(f"{where} makes {length} tokens, more than model.max_positions={limit}: shorten it")
    if saved.config.model.position == "learned" and length + max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens={max_new_tokens} after a prompt of {length} tokens passes the model's {limit} learned "
            f"positions: use at most {limit - length}"
        )
    return ids


class Prompt(BaseModel):
    prompt: str


def read_prompts(path: Path) -> list[tuple[str, str]]:
    """Where each prompt of a JSONL file stands, and the prompt."""
    return [(where, line.prompt) for where, line in read_lines(path, Prompt, '{"prompt": "Once upon"}')]
