"""`megalm tokenizer train`, through the command line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.data.sources import File, make_units
from megalm.data.tokenizer import load_tokenizer
from megalm.data.train_tokenizer import TrainReport, train_tokenizer

WORDS = [
    f"{a}{b}{c} " for a in ("re", "un", "pre") for b in ("run", "walk", "think", "bark") for c in ("ning", "ed", "s")
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [{"text": "".join(WORDS[i * k % len(WORDS)] for k in range(20)) + "\n"} for i in range(100)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"text": 3}\n')
    return path


def run(*arguments: object) -> int:
    return main(["tokenizer", "train", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_training_ends_in_one_line_with_a_lossless_tokenizer(
    tmp_path: Path, corpus: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer"
    assert run("--kind", kind, "--vocab-size", 320, "--input", corpus, "--output", output) == 0
    captured = capfd.readouterr()
    assert captured.err == "", "the libraries' logs are silent"
    assert captured.out.count("\n") == 1
    assert f"{kind}, 320 ids, " in captured.out
    assert "trained on 100 documents" in captured.out
    assert "skipped 1: 'text' is not a string" in captured.out
    tokenizer = load_tokenizer(str(output))
    assert (tokenizer.kind, tokenizer.vocab_size) == (kind, 320)
    held = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[49:100:50]]
    num_bytes, num_tokens = (sum(map(len, batch)) for batch in (held, tokenizer.encode_batch(held)))
    assert re.search(r"([\d.]+) bytes per token on \d+ B of held-out text", captured.out)
    assert f"{num_bytes / num_tokens:.2f} bytes per token on {num_bytes} B of held-out text" in captured.out
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "tokenizer"]


def test_a_large_corpus_is_sampled_evenly(tmp_path: Path, corpus: Path) -> None:
    report = train_tokenizer("bpe", 270, [corpus], tmp_path / "out", sample_bytes=corpus.stat().st_size // 4)
    assert 20 <= report.documents <= 30
    assert report.held_bytes == 0
    assert report.bytes_per_token > 1
    whole = train_tokenizer("bpe", 270, [corpus], tmp_path / "whole")
    assert (whole.documents, whole.skipped) == (100, {"'text' is not a string": 1})


def test_progress_covers_the_whole_input(tmp_path: Path, corpus: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = train_tokenizer("bpe", 270, [corpus], tmp_path / "out", on_progress=lambda *done: seen.append(done))
    assert isinstance(report, TrainReport)
    assert seen == sorted(seen)
    assert seen[-1] == (corpus.stat().st_size, corpus.stat().st_size)
    assert len(make_units([File(corpus, "in")])) == 1


def edit(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (
            None,
            ["--vocab-size", 100000],
            r"--vocab-size 100000: the corpus \(\d+ bytes\) is too small for it: .* at most \d+",
        ),
        (None, ["--vocab-size", 100], r"--vocab-size 100: too small for 256 bytes"),
        (None, ["--vocab-size", -5], r"--vocab-size -5: too small"),
        (None, ["--vocab-size", "many"], r"--vocab-size"),
        (None, ["--kind", "wordpiece"], r"--kind wordpiece: no such kind: choose sentencepiece or bpe"),
        (None, ["--sample-bytes", 0], r"--sample-bytes 0: must be at least 1"),
        (None, ["--text-key", "body"], r"no documents to train on \(no 'body' field: 101\)"),
        (None, ["--input", "nowhere"], r"nowhere: no such file or folder"),
        (Path.unlink, [], r"in\.jsonl: no such file or folder"),
        (edit(""), [], r"no documents to train on"),
        (edit('{"text": ""}\n'), [], r"no documents to train on"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    corpus: Path,
    kind: str,
    change: Callable[[Path], None] | None,
    options: list[object],
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if change:
        change(corpus)
    before = sorted(tmp_path.rglob("*"))
    default = ["--kind", kind, "--vocab-size", 300, "--input", corpus, "--output", tmp_path / "out"]
    assert run(*default, *options) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(rf"megalm: error: .*{reason}", captured.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_characters_that_the_vocabulary_has_no_room_for_are_one_line_with_the_size_that_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("".join(chr(0x4E00 + i) + " " for i in range(200)))
    command = ["--kind", "sentencepiece", "--input", tmp_path / "in.txt", "--output", tmp_path / "out", "--vocab-size"]
    assert run(*command, 300) == 2
    found = re.search(r"--vocab-size 300: too small for the characters .* at least (\d+)\n$", capfd.readouterr().err)
    assert found
    assert run(*command, found[1]) == 0


def test_a_tokenizer_is_replaced_only_when_asked_and_files_of_others_never(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--vocab-size", 300, "--input", corpus, "--output", tmp_path / "out", "--kind"]
    assert run(*command, "bpe") == 0
    assert run(*command, "sentencepiece") == 2
    assert "written already" in capsys.readouterr().err
    assert run(*command, "sentencepiece", "--overwrite") == 0
    assert load_tokenizer(str(tmp_path / "out")).kind == "sentencepiece"
    assert sorted(os.listdir(tmp_path / "out")) == ["megalm-tokenizer.json", "tokenizer.model"]
    (tmp_path / "out" / "notes").touch()
    assert run(*command, "bpe", "--overwrite") == 2
    assert "other files (notes)" in capsys.readouterr().err
