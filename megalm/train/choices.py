"""Multiple choice, judged as HellaSwag and MMLU are: the answer is the choice that the model finds likeliest.

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}         a line a question

    log p(choice | context) = sum over the choice's tokens of log p(token | all before it)

The names of the scores are those of EleutherAI's lm-evaluation-harness: `acc` takes the largest sum, `acc_norm` the
largest sum a character of the choice, `acc_bytes` a byte; each comes with its standard error, s / sqrt(questions).
Text is cut into context and continuation as there: spaces at the context's end belong to the continuation, and the
tokens are those of the two together, so that none is one that the model has not seen in text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.train.lines import read_lines
from megalm.train.packed import Part, Row, read
from megalm.train.passes import Passes

Pair = tuple[list[int], list[int]]
"""The tokens of a context and of what follows it, at least one of each."""


class Likelihood(NamedTuple):
    """Of a continuation: the log of its probability, and whether greedy generation writes it."""

    log_probability: float
    is_greedy: bool


class Scores(NamedTuple):
    """Shares of the questions that are answered rightly."""

    questions: int
    acc: float
    acc_norm: float
    acc_bytes: float

    def error(self, share: float) -> float:
        """The standard error of one of the shares: NaN for a single question."""
        return math.sqrt(share * (1 - share) / (self.questions - 1)) if self.questions > 1 else math.nan


class Question(BaseModel):
    context: str
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> Question:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices, counted from 0")
        return self


Asked = list[tuple[str, Question]]
"""Questions, and where they stand."""


def read_questions(path: Path) -> Asked:
    """The questions in a JSONL file."""
    return read_lines(path, Question, '{"context": "Two and two are", "choices": [" four", " five"], "answer": 0}')


def pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The tokens of both. An empty context is the end of a document, which another one follows."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return [tokenizer.eod], tokenizer.encode(continuation)
    whole, before = tokenizer.encode_batch([context + continuation, context])
    # None are left where the two melt into one token.
    return before, whole[len(before) :] or tokenizer.encode(continuation)


def encode_pairs(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str, str]], limit: int) -> list[Pair]:
    """Of (where it stands, context, continuation). Of a context that is too long for `limit` positions the end is kept;
    a continuation must fit in them."""
    encoded = []
    for where, context, continuation in pairs:
        before, after = pair(tokenizer, context, continuation)
        if not 0 < len(after) <= limit:
            raise UserError(
                f"{where}: '{continuation[:40]}' has {len(after)} tokens, and the model {limit} positions: shorten it, "
                "or leave it out"
            )
        encoded.append((before[max(0, len(before) + len(after) - limit - 1) :], after))
    return encoded


def encode_questions(tokenizer: Tokenizer, asked: Asked, limit: int) -> list[Pair]:
    """Every choice after its context, in order."""
    pairs = [(where, question.context, choice) for where, question in asked for choice in question.choices]
    return encode_pairs(tokenizer, pairs, limit)


def likelihoods(passes: Passes, pairs: Sequence[Pair]) -> list[Likelihood]:
    """Of each pair's continuation, which is its last rows' to predict."""

    def judge(logits_CV: Tensor, rows: list[Row]) -> Tensor:
        label_C = torch.tensor([pairs[part][1][row] for part, row in rows], device=logits_CV.device)
        chosen_C = logits_CV.gather(1, label_C[:, None])[:, 0]
        log_C = chosen_C.double() - logits_CV.logsumexp(-1)
        return torch.stack([log_C, (logits_CV.argmax(-1) == label_C).double()], 1)

    parts = [Part(n, (before + after)[:-1], len(after)) for n, (before, after) in enumerate(pairs)]
    found = read(passes, parts, judge, 2)
    return [Likelihood(log, round(hits) == len(after)) for (log, hits), (_, after) in zip(found, pairs, strict=True)]


def answered(asked: Asked, found: Sequence[Likelihood]) -> Scores:
    """The scores, from the likelihood of every choice of the questions, in order."""
    rights = [0, 0, 0]
    logs = iter(found)
    for _, question in asked:
        sums = [next(logs).log_probability for _ in question.choices]
        lengths = [[1] * len(sums), [len(c) for c in question.choices], [len(c.encode()) for c in question.choices]]
        for kind, units in enumerate(lengths):
            ratios = [total / unit for total, unit in zip(sums, units, strict=True)]
            rights[kind] += ratios.index(max(ratios)) == question.answer
    return Scores(len(asked), *(right / len(asked) for right in rights))
