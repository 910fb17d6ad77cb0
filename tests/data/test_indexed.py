from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm._indexed_dataset import Writer
from megalm.data.indexed import open_index, open_shard, open_tokens, token_dtype
from megalm.data.manifest import Manifest, Shard, TokenizerRecord
from megalm.errors import UserError

LENGTHS = [
    3,
    1,
    4,
]  # the shard of most tests; its .idx has 34 header bytes, 12 of lengths, 24 of offsets, 32 of documents


def write(directory: Path, lengths: list[int] = LENGTHS, dtype: str = "uint16") -> Path:
    with Writer(directory / "shard-00000", dtype) as writer:
        writer.append(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, np.int64))
    return directory / "shard-00000.idx"


def patch(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


@given(st.lists(st.integers(1, 1000), max_size=30), st.sampled_from(["uint16", "int32"]))
def test_an_index_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: str
) -> None:
    directory = tmp_path_factory.mktemp("indexed")
    index = open_index(write(directory, lengths, dtype))
    index.verify()
    assert index.lengths.tolist() == lengths
    assert (index.num_documents, index.num_tokens) == (len(lengths), sum(lengths))
    tokens = open_tokens(directory / "shard-00000.bin", index.dtype, sum(lengths))
    assert tokens.tolist() == list(range(sum(lengths)))
    starts = index.offsets // index.dtype.itemsize
    assert [tokens[s] for s in starts] == np.cumsum([0, *lengths])[:-1].tolist()


def test_an_index_may_end_with_multimodal_modes(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes() + bytes(3))
    assert open_index(path).lengths.tolist() == LENGTHS


def test_every_truncation_of_an_index_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"shard-00000\.idx: corrupt index"):
            open_index(path)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"X", "it starts with"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 4), "4 sequences and 3 documents"),
        (18, struct.pack("<Q", 2**63), "corrupt index"),
        (26, struct.pack("<Q", 0), "no document table"),
        (26, struct.pack("<Q", 5), "3 sequences and 4 documents"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, offset: int, content: bytes, reason: str
) -> None:
    path = write(tmp_path)
    patch(path, offset, content)
    with pytest.raises(UserError, match=reason) as caught:
        open_index(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (34, struct.pack("<i", -3), "sequence 0 has a negative length"),
        (38, struct.pack("<i", 2), "sequence 2 does not start"),
        (54, struct.pack("<q", 7), "sequence 1 does not start"),
        (46, struct.pack("<q", -2), "sequence 0 does not start"),
        (70, struct.pack("<q", 1), "documents do not cover"),
        (78, struct.pack("<q", 3), "documents do not cover"),
        (94, struct.pack("<q", 2), "documents do not cover"),
    ],
)
def test_verify_finds_the_wrong_entry(tmp_path: Path, offset: int, content: bytes, reason: str) -> None:
    path = write(tmp_path)
    patch(path, offset, content)
    with pytest.raises(UserError, match=reason):
        open_index(path).verify()


@pytest.mark.parametrize(("change", "word"), [(lambda b: b[:-1], "too short"), (lambda b: b + b"\0\0", "too long")])
def test_a_bin_of_another_size_is_refused_by_name(tmp_path: Path, change: Callable[[bytes], bytes], word: str) -> None:
    write(tmp_path)
    path = tmp_path / "shard-00000.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"shard-00000\.bin: {word}"):
        open_tokens(path, np.dtype("<u2"), sum(LENGTHS))


def test_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard-00000\.idx: the file is missing"):
        open_index(tmp_path / "shard-00000.idx")
    with pytest.raises(UserError, match=r"shard-00000\.bin: the file is missing"):
        open_tokens(tmp_path / "shard-00000.bin", np.dtype("<u2"), 0)


@pytest.mark.parametrize(
    ("dtype", "documents", "tokens", "reason"),
    [
        ("uint16", 3, 8, ""),
        ("int32", 3, 8, "uint16 tokens, while the manifest says int32"),
        ("uint16", 2, 8, "3 documents, while the manifest says 2"),
        ("uint16", 3, 9, "8 tokens, while the manifest says 9"),
    ],
)
def test_a_shard_must_be_what_the_manifest_says(
    tmp_path: Path, dtype: str, documents: int, tokens: int, reason: str
) -> None:
    write(tmp_path)
    shard = Shard("shard-00000", documents, tokens, 0, "", "")
    manifest = Manifest(TokenizerRecord("byte", "byte", "", 257, 256), dtype, {}, (shard,))
    if reason:
        with pytest.raises(UserError, match=reason):
            open_shard(tmp_path, manifest, shard)
    else:
        index, content = open_shard(tmp_path, manifest, shard)
        assert (index.num_documents, content.tolist()) == (3, list(range(8)))


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (65536, "int32")]
)
def test_small_vocabularies_are_stored_in_two_bytes_as_megatron_does(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
