"""The C++ reader, against files written from the format's table."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed_files import CODES, documents_of, write_files

from megalm._indexed_dataset import Reader
from megalm.errors import UserError

# The shard of most tests; its .idx has 34 header bytes, 12 of lengths, 24 of offsets, 24 of documents.
DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6, 7, 8]]]


def patch(path: Path, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)


@given(st.data(), st.sampled_from(sorted(CODES)), st.booleans())
def test_a_shard_gives_back_what_is_in_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, has_modes: bool
) -> None:
    documents = data.draw(documents_of(dtype))
    sequences = [sequence for document in documents for sequence in document]
    modes = [i % 3 for i in range(len(sequences))] if has_modes else None
    reader = Reader(write_files(tmp_path_factory.mktemp("reader") / "shard", documents, dtype, modes))
    reader.verify()
    lengths = [len(sequence) for sequence in sequences]
    tokens = [token for sequence in sequences for token in sequence]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    assert (reader.dtype, reader.sequences) == (dtype, len(sequences))
    assert (reader.documents, reader.tokens) == (len(documents), len(tokens))
    assert reader.lengths().tolist() == lengths
    assert reader.offsets().tolist() == (np.dtype(dtype).itemsize * np.cumsum([0, *lengths])[:-1]).tolist()
    assert reader.document_starts().tolist() == starts
    assert reader.has_modes == bool(modes)  # without a sequence nothing tells
    assert reader.modes().tolist() == (modes or [])
    assert reader.read(0, len(tokens)).tolist() == tokens
    for number, document in enumerate(documents):
        assert reader.document(number).tolist() == [token for sequence in document for token in sequence]
    first = data.draw(st.integers(0, len(lengths)))
    count = data.draw(st.integers(0, len(lengths) - first))
    assert reader.lengths(first, count).tolist() == lengths[first : first + count]
    assert reader.lengths(first).tolist() == lengths[first:]


def test_tables_longer_than_a_block_are_verified_and_read_whole(tmp_path: Path) -> None:
    count = 150_000
    lengths = np.random.default_rng(0).integers(0, 3, count).astype("<i4")
    offsets = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    index += lengths.tobytes() + offsets.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
    (tmp_path / "shard.idx").write_bytes(index)
    tokens = np.arange(lengths.sum(), dtype=np.int64) % 65536
    (tmp_path / "shard.bin").write_bytes(tokens.astype("<u2").tobytes())
    reader = Reader(tmp_path / "shard")
    reader.verify()
    assert np.array_equal(reader.lengths(), lengths)
    assert np.array_equal(reader.read(0, reader.tokens), tokens)
    patch(tmp_path / "shard.idx", 34 + 4 * 140_000, b"\x09")
    with pytest.raises(UserError, match="sequence 140001 does not start"):
        Reader(tmp_path / "shard").verify()


def test_every_truncation_of_an_index_is_refused_by_name(tmp_path: Path) -> None:
    prefix = write_files(tmp_path / "shard", DOCUMENTS, "uint16")
    path = tmp_path / "shard.idx"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{tmp_path}/shard\.idx: corrupt index"):
            Reader(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (0, b"X", "it does not start with 'MMIDIDX' and two zeros"),
        (9, struct.pack("<Q", 2), "version 2 is not 1"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x00", "dtype code 0"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 4), "94 bytes are not what 4 sequences and 2 documents make"),
        (18, struct.pack("<Q", 2**63), "9223372036854775808 sequences"),
        (18, struct.pack("<Q", 2**62 + 3), "4611686018427387907 sequences"),  # modulo 2**64, the size is right
        (26, struct.pack("<Q", 0), "no document table"),
        (26, struct.pack("<Q", 5), "3 sequences and 4 documents"),
        (26, struct.pack("<Q", 2**64 - 1), "18446744073709551614 documents"),
        (42, struct.pack("<i", -1), "the last sequence has -1 tokens from byte 8"),
        (62, struct.pack("<q", -2), "the last sequence has 4 tokens from byte -2"),
        (62, struct.pack("<q", 3), "the last sequence has 4 tokens from byte 3"),
    ],
)
def test_a_header_that_cannot_be_is_refused_with_the_reason(
    tmp_path: Path, offset: int, content: bytes, reason: str
) -> None:
    prefix = write_files(tmp_path / "shard", DOCUMENTS, "uint16")
    patch(tmp_path / "shard.idx", offset, content)
    with pytest.raises(UserError, match=rf"{tmp_path}/shard\.idx: corrupt index: .*{reason}.*: prepare the data again"):
        Reader(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (34, struct.pack("<i", -3), "sequence 0 has a negative length"),
        (38, struct.pack("<i", 2), "sequence 2 does not start"),
        (54, struct.pack("<q", 7), "sequence 1 does not start"),
        (46, struct.pack("<q", -2), "sequence 0 does not start"),
        (70, struct.pack("<q", 1), "documents do not cover"),
        (78, struct.pack("<q", 4), "documents do not cover"),
        (78, struct.pack("<q", -1), "documents do not cover"),
        (86, struct.pack("<q", 2), "documents do not cover"),
    ],
)
def test_verify_finds_the_wrong_entry(tmp_path: Path, offset: int, content: bytes, reason: str) -> None:
    prefix = write_files(tmp_path / "shard", DOCUMENTS, "uint16")
    patch(tmp_path / "shard.idx", offset, content)
    with pytest.raises(UserError, match=rf"{tmp_path}/shard\.idx: damaged: .*{reason}"):
        Reader(prefix).verify()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda whole: whole[:-1], "too short: 15 bytes, while .*shard.idx tells of 16"),
        (lambda whole: whole + b"\0\0", "too long: 18 bytes"),
    ],
)
def test_a_bin_of_another_size_is_refused_by_name(
    tmp_path: Path, change: Callable[[bytes], bytes], reason: str
) -> None:
    prefix = write_files(tmp_path / "shard", DOCUMENTS, "uint16")
    path = tmp_path / "shard.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{tmp_path}/shard\.bin: {reason}"):
        Reader(prefix)


def test_missing_files_and_directories_are_refused_by_name(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        prefix = write_files(tmp_path / "shard", DOCUMENTS, "uint16")
        prefix.with_suffix(suffix).unlink()
        with pytest.raises(UserError, match=rf"{tmp_path}/shard\{suffix}: the file is missing"):
            Reader(prefix)
        prefix.with_suffix(suffix).mkdir()
        with pytest.raises(UserError, match=rf"{tmp_path}/shard\{suffix}: this is not a regular file"):
            Reader(prefix)
        prefix.with_suffix(suffix).rmdir()


@given(st.data(), st.sampled_from(["uint16", "int32"]))
def test_documents_are_found_by_the_tokens_they_start_at(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str
) -> None:
    documents = data.draw(documents_of(dtype, 20))
    reader = Reader(write_files(tmp_path_factory.mktemp("between") / "shard", documents, dtype))
    lengths = [sum(map(len, document)) for document in documents]
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    for first in range(-1, reader.tokens + 2):
        for end in (first, first + 1, first + 7, reader.tokens + 1):
            assert reader.documents_between(first, end).tolist() == [start for start in starts if first <= start < end]


def test_what_is_not_there_is_an_index_error(tmp_path: Path) -> None:
    reader = Reader(write_files(tmp_path / "shard", DOCUMENTS, "uint16"))
    beyond: list[Callable[[], object]] = [
        lambda: reader.lengths(4),
        lambda: reader.lengths(2, 2),
        lambda: reader.offsets(0, 4),
        lambda: reader.document_starts(1, 2**64 - 1),
        lambda: reader.modes(0, 1),
        lambda: reader.document(2),
        lambda: reader.read(0, 9),
        lambda: reader.read(9, 0),
        lambda: reader.read(1, 2**64 - 1),
    ]
    for ask in beyond:
        with pytest.raises(IndexError):
            ask()


def test_the_name_of_a_file_may_be_any_bytes(tmp_path: Path) -> None:
    prefix = tmp_path / "caf\udce9"  # not UTF-8
    with pytest.raises(UserError) as caught:
        Reader(prefix)
    assert str(caught.value).startswith(f"{prefix}.idx: the file is missing")
    assert Reader(write_files(prefix, DOCUMENTS, "int32")).tokens == 8
