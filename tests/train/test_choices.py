"""Multiple choice: boundaries, scores and standard errors, mistakes in files, and the command."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from megalm.cli import main
from megalm.config.sections import Model
from megalm.data.tokenizer import ByteTokenizer, load_tokenizer
from megalm.errors import UserError
from megalm.model.init import initialise
from megalm.model.transformer import Transformer
from megalm.train import packed
from megalm.train.choices import (
    Likelihood,
    Question,
    Scores,
    answered,
    encode_pairs,
    likelihoods,
    pair,
    read_questions,
)
from megalm.train.passes import Passes

MODEL = Model(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=80, vocab_size=257,
    max_positions=32, init_std=0.3,
)  # fmt: skip


def test_a_likelihood_is_the_sum_of_its_tokens_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "TOKENS", 20)  # several micro-batches
    monkeypatch.setattr(packed, "SLICE_LOGITS", 257 * 3)  # and slices that end inside of a continuation
    model = Transformer(MODEL)
    initialise(model, seed=3)
    texts = [("abc", "de"), ("", "x"), ("longer context", " and its end"), ("a", "b" * 20)]
    pairs = encode_pairs(ByteTokenizer(), [("here", *text) for text in texts], 32)
    greedy = [pairs[0][0], []]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.tensor(greedy[0] + greedy[1])
            x_TD = model.hidden(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]))
            greedy[1].append(int(model.logits(x_TD)[-1].argmax()))
    found = likelihoods(Passes.of(model), [*pairs, (greedy[0], greedy[1])])
    assert [one.is_greedy for one in found] == [False, False, False, False, True]
    for (before, after), (log, _) in zip(pairs, found, strict=False):
        ids = torch.tensor(before + after)
        with torch.no_grad():
            x_TD = model.hidden(ids[:-1], torch.arange(len(ids) - 1), torch.tensor([0, len(ids) - 1]))
            logs_TV = model.logits(x_TD).double().log_softmax(-1)[-len(after) :]
        assert log == pytest.approx(sum(logs_TV[row, token].item() for row, token in enumerate(after)), rel=1e-5)


def test_spaces_at_the_contexts_end_belong_to_the_continuation(data: Path, tmp_path: Path) -> None:
    """So that the continuation's first token is the one with the space, as in text."""
    path = str(tmp_path / "tokenizer")
    text = str(data / "a.jsonl")
    made = ["tokenizer", "train", "--kind", "bpe", "--vocab-size", "300", "--input", text, "--output", path]
    assert main(made) == 0
    tokenizer = load_tokenizer(path)
    before, after = pair(tokenizer, "a: number 1 is ", "followed")
    assert (before, after) == pair(tokenizer, "a: number 1 is", " followed")
    assert before + after == tokenizer.encode("a: number 1 is followed")
    assert tokenizer.decode(after) == " followed"
    assert pair(tokenizer, "  ", "followed") == ([tokenizer.eod], tokenizer.encode("  followed"))
    assert pair(tokenizer, "number", " ")[1]
    merged = pair(tokenizer, "followe", "d")  # one token, together
    assert merged[0] == tokenizer.encode("followe")
    assert merged[1]


def test_a_long_context_keeps_its_end_and_a_long_continuation_is_refused() -> None:
    tokenizer = ByteTokenizer()
    [(before, after)] = encode_pairs(tokenizer, [("here", "0123456789", "ab")], 8)
    assert tokenizer.decode(before + after) == "3456789ab", "the last token is predicted and not read"
    [(before, after)] = encode_pairs(tokenizer, [("here", "0123456789", "abcdefgh")], 8)
    assert tokenizer.decode(before + after) == "9abcdefgh"
    with pytest.raises(UserError, match=r"here: 'abcdefghi' has 9 tokens, and the model 8 positions"):
        encode_pairs(tokenizer, [("here", "", "abcdefghi")], 8)


def test_scores_weigh_by_nothing_characters_and_bytes_and_have_standard_errors() -> None:
    choices = ["x", "xxxx", "éé"]
    asked = [("", Question(context="", choices=choices, answer=answer)) for answer in (0, 1, 2, 0)]
    logs = [-1.0, -2.0, -1.2] * 4  # best: by the sum x, by the character xxxx (-0.5), by the byte éé (-0.3)
    found = answered(asked, [Likelihood(log, False) for log in logs])
    assert found == Scores(4, 0.5, 0.25, 0.25)
    for share, hits in ((found.acc, [1, 0, 0, 1]), (found.acc_norm, [0, 1, 0, 0])):
        assert found.error(share) == pytest.approx(statistics.stdev(hits) / math.sqrt(4))
    assert math.isnan(Scores(1, 1.0, 1.0, 1.0).error(1.0))


GOOD = {"context": "a: number 1 is", "choices": [" followed", " zzz"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "object"),
        (json.dumps({**GOOD, "answer": 2}), "answer 2 is none of the 2 choices, counted from 0"),
        (json.dumps({**GOOD, "answer": "0"}), "answer: "),
        (json.dumps({**GOOD, "answer": True}), "answer: "),
        (json.dumps({**GOOD, "choices": [" a"]}), "choices: "),
        (json.dumps({**GOOD, "choices": [" a", ""]}), "choices.1: "),
        (json.dumps({**GOOD, "choices": "ab"}), "choices: "),
        (json.dumps({"choices": ["a", "b"], "answer": 0}), "context: "),
        (json.dumps({**GOOD, "context": None}), "context: "),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        read_questions(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert words in str(error.value)
    assert "write lines such as" in str(error.value)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no line"):
        read_questions(tmp_path / "empty.jsonl")
