"""The C++ writer, against the format's table written out with struct and numpy."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm._indexed_dataset import Writer

CODES = {"uint16": 8, "int32": 4}


def reference(documents: list[list[int]], dtype: str) -> tuple[bytes, bytes]:
    """The .bin and .idx of Megatron's format, from its table alone."""
    item = np.dtype(dtype).newbyteorder("<")
    content = b"".join(np.array(document, item).tobytes() for document in documents)
    lengths = [len(document) for document in documents]
    offsets = [item.itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    count = len(documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], count, count + 1)
    index += struct.pack(f"<{count}i", *lengths)
    index += struct.pack(f"<{count}q", *offsets)
    index += struct.pack(f"<{count + 1}q", *range(count + 1))
    return content, index


def flat(documents: list[list[int]], kind: type = np.int32) -> tuple[np.ndarray, np.ndarray]:
    return np.array([t for d in documents for t in d], kind), np.array([len(d) for d in documents], np.int64)


def written(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_suffix(".bin").read_bytes(), prefix.with_suffix(".idx").read_bytes()


@st.composite
def appends(draw: st.DrawFn) -> tuple[str, type, list[list[list[int]]]]:
    dtype = draw(st.sampled_from(sorted(CODES)))
    largest = 2**16 - 1 if dtype == "uint16" else 2**31 - 1
    document = st.lists(st.integers(0, largest) | st.just(largest), min_size=1, max_size=20)
    return (
        dtype,
        draw(st.sampled_from([np.int32, np.uint32])),
        draw(st.lists(st.lists(document, max_size=5), max_size=4)),
    )


@given(appends())
def test_files_are_megatrons_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, type, list[list[list[int]]]]
) -> None:
    dtype, kind, batches = case
    prefix = tmp_path_factory.mktemp("writer") / "shard"
    with Writer(prefix, dtype) as writer:
        for batch in batches:
            writer.append(*flat(batch, kind))
    documents = [document for batch in batches for document in batch]
    assert written(prefix) == reference(documents, dtype)
    assert (writer.documents, writer.tokens) == (len(documents), sum(map(len, documents)))
    assert sorted(os.listdir(prefix.parent)) == ["shard.bin", "shard.idx"]


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_appends_larger_and_smaller_than_the_buffer_keep_their_order(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 65536, n, np.int32) for n in (10, 700_000, 3, 262_144, 524_288, 1)]
    with Writer(tmp_path / "shard", dtype) as writer:
        for batch in batches:
            writer.append(batch, np.array([len(batch)]))
    content, _ = written(tmp_path / "shard")
    assert np.array_equal(np.frombuffer(content, dtype), np.concatenate(batches))


def test_unaligned_arrays_are_read_as_well_as_aligned_ones(tmp_path: Path) -> None:
    tokens = np.frombuffer(b"x" + np.arange(9, dtype=np.int32).tobytes(), np.int32, offset=1)
    lengths = np.frombuffer(b"x" + np.array([4, 5]).tobytes(), np.int64, offset=1)
    assert not tokens.flags.aligned
    with Writer(tmp_path / "shard", "int32") as writer:
        writer.append(tokens, lengths)
    assert written(tmp_path / "shard") == reference([[0, 1, 2, 3], [4, 5, 6, 7, 8]], "int32")


@pytest.mark.parametrize(
    ("dtype", "tokens", "lengths", "reason"),
    [
        ("uint16", np.array([5, 65536], np.int32), [2], "token 65536 at place 1 is outside of 0 to 65535"),
        ("uint16", np.array([-1], np.int32), [1], "token -1 at place 0"),
        ("int32", np.array([-7], np.int32), [1], "token -7 at place 0"),
        ("int32", np.array([2**31], np.uint32), [1], "token 2147483648 at place 0 is outside of 0 to 2147483647"),
        ("int32", np.array([1, 2], np.int32), [1], "1 of 2 tokens belong to no document"),
        ("int32", np.array([1, 2], np.int32), [1, 2], "more tokens than the 2 given"),
        ("int32", np.array([1, 2], np.int32), [3, -1], "more tokens than the 2 given"),
        ("int32", np.array([1, 2], np.int32), [-1, 3], "document 0 has -1 tokens"),
        ("int32", np.array([1], np.int32), [0, 1], "document 0 has 0 tokens"),
        ("int32", np.array([[1]], np.int32), [1], "must be flat"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_of_it_is_written(
    tmp_path: Path, dtype: str, tokens: np.ndarray, lengths: list[int], reason: str
) -> None:
    with Writer(tmp_path / "shard", dtype) as writer:
        writer.append(*flat([[1, 2, 3]]))
        with pytest.raises(ValueError, match=reason) as caught:
            writer.append(tokens, np.array(lengths, np.int64))
        if tokens.ndim == 1:
            assert str(caught.value).startswith(f"{tmp_path}/shard.bin: ")
        writer.append(*flat([[4]]))
    assert written(tmp_path / "shard") == reference([[1, 2, 3], [4]], dtype)


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (np.array([1.0]), np.array([1])),
        (np.array([1], np.int64), np.array([1])),
        (np.array([1], np.int32), np.array([1.0])),
        (np.array([1], ">i4"), np.array([1])),
        (np.arange(4, dtype=np.int32)[::2], np.array([2])),
        ([1], [1]),
    ],
)
def test_other_types_are_refused_and_not_converted(tmp_path: Path, tokens: object, lengths: object) -> None:
    with Writer(tmp_path / "shard", "int32") as writer, pytest.raises(TypeError):
        writer.append(tokens, lengths)


def test_an_unknown_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int64' is neither"):
        Writer(tmp_path / "shard", "int64")
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_when_the_block_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Writer(tmp_path / "shard", "int32") as writer:
            writer.append(*flat([[1]]))
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        fail()
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_writer_that_is_dropped(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "shard", "int32")
    writer.append(*flat([[1]]))
    assert len(os.listdir(tmp_path)) == 1
    del writer
    assert os.listdir(tmp_path) == []


def test_a_finished_or_discarded_shard_takes_no_more(tmp_path: Path) -> None:
    for end in (Writer.finish, Writer.discard):
        writer = Writer(tmp_path / "shard", "int32")
        end(writer)
        with pytest.raises(ValueError, match=r"shard\.bin: the shard was already finished or discarded"):
            writer.append(*flat([[1]]))


def test_a_missing_directory_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Writer(tmp_path / "nowhere" / "shard", "int32")
    assert caught.value.filename == str(tmp_path / "nowhere" / "shard.bin")


def test_neither_file_appears_when_the_index_cannot_have_its_name(tmp_path: Path) -> None:
    (tmp_path / "shard.idx").mkdir()
    writer = Writer(tmp_path / "shard", "int32")
    writer.append(*flat([[1]]))
    with pytest.raises(IsADirectoryError) as caught:
        writer.finish()
    assert caught.value.filename == str(tmp_path / "shard.idx")
    assert os.listdir(tmp_path) == ["shard.idx"]


@pytest.mark.parametrize("tokens", [1_000_000, 200_000])
def test_a_file_that_may_not_grow_is_an_error_that_names_it_and_leaves_nothing(tmp_path: Path, tokens: int) -> None:
    """A limit on file size stands for a full disk: met while appending (4 MB), or at the end, when the buffer (0.8 MB)
    is written."""
    script = f"""
import resource, sys
import numpy as np
from megalm._indexed_dataset import Writer
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    with Writer({str(tmp_path / "shard")!r}, "int32") as writer:
        writer.append(np.zeros({tokens}, np.int32), np.array([{tokens}]))
except OSError as error:
    print(error.errno, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path / "shard.bin")]
    assert os.listdir(tmp_path) == []


@settings(max_examples=5)
@given(st.integers(2, 4))
def test_threads_take_turns_and_no_document_is_torn(tmp_path_factory: pytest.TempPathFactory, count: int) -> None:
    prefix = tmp_path_factory.mktemp("threads") / "shard"

    def append_many(writer: Writer, token: int) -> None:
        for _ in range(50):
            writer.append(*flat([[token] * 100, [token] * 7]))

    with Writer(prefix, "uint16") as writer:
        threads = [threading.Thread(target=append_many, args=(writer, token)) for token in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    content, _ = written(prefix)
    pairs = np.frombuffer(content, np.uint16).reshape(-1, 107)
    assert (pairs == pairs[:, :1]).all()
    assert sorted(pairs[:, 0]) == sorted(list(range(count)) * 50)
