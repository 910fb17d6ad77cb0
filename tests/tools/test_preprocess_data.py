"""tools/preprocess_data.py: what Megatron's readers find in the files is what its own tool would have put there."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
TEXTS = [f"document {i}: " + "né 日本 <|endoftext|>\n" * (i % 5 + 1) for i in range(300)]


@pytest.fixture
def gpt2(tmp_path: Path) -> tokenizers.Tokenizer:
    """A tokenizer as GPT-2's: gpt2/vocab.json, gpt2/merges.txt and gpt2/tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    (tmp_path / "gpt2").mkdir()
    tokenizer.model.save(str(tmp_path / "gpt2"))
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.json"  # as Megatron's own examples call it
    records = [{"text": text, "body": text.upper()} for text in TEXTS]
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"text": "", "body": " "}]))
    return path


def preprocess(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def read(prefix: Path) -> list[list[int]]:
    """The documents of PREFIX.bin and .idx, by the format's table alone."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, code, documents) == (b"MMIDIDX\0\0", 1, 8, sequences + 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    starts = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    assert starts.tolist() == list(range(documents))
    assert len(index) == 34 + 12 * sequences + 8 * documents
    tokens = np.fromfile(f"{prefix}.bin", "<u2")
    assert len(tokens) == lengths.sum()
    return [tokens[o // 2 : o // 2 + n].tolist() for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_are_in_order_and_ended_only_if_asked(
    tmp_path: Path, corpus: Path, gpt2: tokenizers.Tokenizer, append_eod: bool
) -> None:
    kinds: list[list[object]] = [
        [
            "GPT2BPETokenizer",
            "--vocab-file",
            tmp_path / "gpt2/vocab.json",
            "--merge-file",
            tmp_path / "gpt2/merges.txt",
        ],
        ["HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "gpt2"],
    ]
    eod = [gpt2.token_to_id("<|endoftext|>")] if append_eod else []
    for number, kind in enumerate(kinds):
        prefix = tmp_path / f"out-{number}"
        flags = ["--append-eod"] if append_eod else []
        keys = ["--json-keys", "text", "body"]
        done = preprocess(
            "--input", corpus, "--output-prefix", prefix, "--tokenizer-type", *kind, "--workers", 1, *keys, *flags
        )
        assert (done.returncode, done.stderr) == (0, "")
        for key, texts in (("text", TEXTS), ("body", [text.upper() for text in TEXTS])):
            documents = read(tmp_path / f"out-{number}_{key}_document")
            assert documents == [gpt2.encode(text, add_special_tokens=False).ids + eod for text in texts]
    names = [
        f"out-{number}_{key}_document.{end}" for number in (0, 1) for key in ("body", "text") for end in ("bin", "idx")
    ]
    assert sorted(os.listdir(tmp_path)) == ["corpus.json", "gpt2", *names]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_megatron_reads_the_files_and_would_write_the_same(
    tmp_path: Path, corpus: Path, gpt2: tokenizers.Tokenizer
) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "gpt2", "--append-eod"]
    done = preprocess("--input", corpus, "--output-prefix", tmp_path / "ours", "--workers", 2, *flags)
    assert done.returncode == 0
    dtype = indexed_dataset.DType.optimal_dtype(gpt2.get_vocab_size())
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in TEXTS:
        ids = [*gpt2.encode(text, add_special_tokens=False).ids, gpt2.token_to_id("<|endoftext|>")]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        ours = (tmp_path / f"ours_text_document.{end}").read_bytes()
        assert ours == (tmp_path / f"theirs.{end}").read_bytes()
    assert len(indexed_dataset.IndexedDataset(str(tmp_path / "ours_text_document"))) == len(TEXTS)


def test_a_run_killed_after_its_parts_were_made_goes_on_from_them(
    tmp_path: Path, corpus: Path, gpt2: tokenizers.Tokenizer
) -> None:
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "gpt2", "--append-eod"]
    command = ["--input", corpus, "--output-prefix", tmp_path / "out", "--workers", 1, *flags]
    (tmp_path / "out_text_document.bin").mkdir()  # where the first of the files is to be
    failed = preprocess(*command)
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/out_text_document.bin: Is a directory" in failed.stderr
    assert (tmp_path / ".out_text_document.parts" / "manifest.json").exists()
    (tmp_path / "out_text_document.bin").rmdir()
    done = preprocess(*command)
    assert done.returncode == 0
    assert "input, done before" in done.stdout
    assert len(read(tmp_path / "out_text_document")) == len(TEXTS)
    assert not (tmp_path / ".out_text_document.parts").exists()


def test_mistakes_end_in_one_line(tmp_path: Path, corpus: Path, gpt2: tokenizers.Tokenizer) -> None:
    for flags, reason in (
        (["HuggingFaceTokenizer"], "--tokenizer-model: HuggingFaceTokenizer needs it"),
        (["HuggingFaceTokenizer", "--tokenizer-model", "nowhere"], "tokenizer nowhere: no such file"),
        (["SentencePieceTokenizer", "--tokenizer-model", tmp_path / "gpt2"], "not a sentencepiece .model file"),
        (["GPT2BPETokenizer"], "--vocab-file : GPT2BPETokenizer needs this file"),
        (
            ["GPT2BPETokenizer", "--vocab-file", tmp_path / "gpt2/vocab.json", "--merge-file", corpus],
            f"--vocab-file {tmp_path}/gpt2/vocab.json, --merge-file {corpus}: ",
        ),
    ):
        done = preprocess("--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer-type", *flags)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert reason in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["corpus.json", "gpt2"]
