"""`megalm data inspect`: totals, documents and one training sample, read as training reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.data.inspect import documents, sample
from megalm.data.manifest import Manifest
from megalm.data.prepare import Settings, prepare
from megalm.data.tokenizer import load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError

TEXTS = [f"document {i}: " + "né 日本 😀\n\t" * (i % 7 + 1) for i in range(40)]


def run(*arguments: object) -> int:
    return main(["data", "inspect", *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def prepared(tmp_path: Path, corpus: Path) -> Path:
    prepare([corpus], "byte", tmp_path / "out", Settings(unit_bytes=1000))
    return tmp_path / "out"


@pytest.fixture
def stream(prepared: Path) -> list[int]:
    """All tokens, read from the shards' .bin files by hand."""
    return [token for path in sorted(prepared.glob("*.bin")) for token in memoryview(path.read_bytes()).cast("H")]


def test_documents_are_spread_evenly_and_read_as_they_lie(prepared: Path, stream: list[int]) -> None:
    manifest, tokenizer = Manifest.load(prepared), load_tokenizer("byte")
    in_order: list[bytes] = [b""]
    for token in stream:
        if token == tokenizer.eod:
            in_order.append(b"")
        else:
            in_order[-1] += bytes([token])
    assert sorted(text.decode() for text in in_order[:-1]) == sorted(TEXTS)
    for count in (0, 1, 3, 39, 40, 100):
        found = [document.text for document in documents(prepared, manifest, tokenizer, count)]
        wanted = min(count, 40)
        assert found == [in_order[i * 40 // wanted].decode() for i in range(wanted)]


@pytest.mark.parametrize("length", [7, 64, 1000])
def test_a_training_sample_is_the_streams_tokens_cut_at_document_ends(
    prepared: Path, stream: list[int], length: int
) -> None:
    manifest, tokenizer = Manifest.load(prepared), load_tokenizer("byte")
    count = (len(stream) - 1) // length
    for number in {0, count // 2, count - 1}:
        found = sample(prepared, manifest, tokenizer, number, length)
        assert (found.number, found.of, found.first) == (number, count, number * length)
        tokens = stream[number * length : number * length + length]
        parts: list[list[int]] = [[]]
        for token in tokens:
            parts[-1].append(token)
            if token == tokenizer.eod:
                parts.append([])
        parts = [part for part in parts if part]
        assert len(found.segments) == len(parts)
        for segment, part in zip(found.segments, parts, strict=True):
            ended = part[-1] == tokenizer.eod
            assert (segment.tokens, segment.ended, segment.in_loss) == (len(part), ended, len(part) - ended)
            assert segment.text == bytes(part[: len(part) - ended]).decode(errors="replace")
        firsts = [sum(len(part) for part in parts[:i]) for i in range(len(parts))]
        assert [segment.first for segment in found.segments] == firsts


def test_a_sample_that_is_not_there_is_refused(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = Manifest.load(prepared).tokens
    assert run(prepared, "--sample", 10**6, "--sequence-length", 100) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the {tokens} tokens of {prepared} make samples 0 to {(tokens - 1) // 100 - 1}" in captured.err
    assert run(prepared, "--sample", 0, "--sequence-length", tokens) == 2
    assert "make no sample" in capsys.readouterr().err
    assert run(prepared, "--sequence-length", tokens) == 0, "one that was not asked for is left out"
    assert "training sample" not in capsys.readouterr().out


def test_the_command_shows_totals_documents_and_where_a_samples_documents_end(
    prepared: Path, stream: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(prepared)
    assert run(prepared, "--documents", 2, "--sample", 1, "--sequence-length", 400) == 0
    shown = capsys.readouterr().out
    assert manifest.fingerprint in shown
    assert f"{manifest.tokens:,}" in shown
    totals, _, text = shown.partition("=== training sample 1 of ")
    assert totals.count("\n--- shard-") == 2
    ends = stream[400:800].count(manifest.tokenizer.eod)
    assert ends > 1
    assert text.count(" <end of document>") == ends
    heads = re.findall(r"--- its tokens (\d+) to (\d+), positions from 0: (\d+) tokens, (\d+) in the loss", text)
    assert sum(int(tokens) for _, _, tokens, _ in heads) == 400
    assert sum(int(in_loss) for *_, in_loss in heads) == 400 - ends


def test_inspecting_reads_no_file_whole(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted(prepared.glob("*.bin"))[-1]
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # what only a checksum finds
    path.write_bytes(content)
    assert run(prepared, "--documents", 0) == 0


def test_what_would_steer_the_terminal_is_spelled_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x1b[31mred\x07")
    prepare([tmp_path / "a.txt"], "byte", tmp_path / "out")
    assert run(tmp_path / "out", "--sequence-length", 5) == 0
    shown = capsys.readouterr().out
    assert shown.count("\\x1b[31m") == 2, "in the document and in the sample"
    assert "\x1b[31m" not in shown


def test_a_tokenizer_that_was_moved_is_found_and_another_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("tokenizer", 290), ("other", 300)):
        train_tokenizer("bpe", size, [corpus], tmp_path / name)
    prepare([corpus], str(tmp_path / "tokenizer"), tmp_path / "out")
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    assert run(tmp_path / "out", "--documents", 0) == 0
    assert run(tmp_path / "out", "--tokenizer", tmp_path / "moved") == 0
    capsys.readouterr()
    for options in ([], ["--tokenizer", tmp_path / "other"]):
        assert run(tmp_path / "out", *options) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="the tokenizer is not the one"):
        sample(tmp_path / "out", Manifest.load(tmp_path / "out"), load_tokenizer("byte"), 0, 10)
