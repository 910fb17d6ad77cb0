"""Joining shards, against the format's table written out for all documents at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed_files import CODES, content, documents_of, read_files, write_files
from unlocked import lets_other_threads_run

from megalm._indexed_dataset import BatchMemory, Reader, assemble, merge
from megalm.errors import UserError


@given(st.data(), st.sampled_from(sorted(CODES)), st.booleans())
def test_a_merge_is_what_one_builder_would_have_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, has_modes: bool
) -> None:
    directory = tmp_path_factory.mktemp("merge")
    parts = data.draw(st.lists(documents_of(dtype), min_size=1, max_size=4))
    if has_modes:  # of a part without a sequence nothing tells whether it has modes
        parts = [[[[1], [2]], *part] for part in parts]
    all_modes = [[number] * sum(map(len, part)) if has_modes else None for number, part in enumerate(parts)]
    for number, (part, modes) in enumerate(zip(parts, all_modes, strict=True)):
        write_files(directory / f"part{number}", part, dtype, modes)
    merge([directory / f"part{number}" for number in range(len(parts))], directory / "whole")
    modes = [mode for part in all_modes for mode in part or []]
    documents = [document for part in parts for document in part]
    assert read_files(directory / "whole") == content(documents, dtype, modes if has_modes else None)
    assert len(os.listdir(directory)) == 2 * (len(parts) + 1)


def test_tables_longer_than_a_block_are_joined_whole(tmp_path: Path) -> None:
    documents = [[[i % 7] * (i % 3)] for i in range(70_000)]
    write_files(tmp_path / "a", documents, "uint16")
    write_files(tmp_path / "b", documents[:3], "uint16")
    merge([tmp_path / "a", tmp_path / "b", tmp_path / "a"], tmp_path / "whole")
    assert read_files(tmp_path / "whole") == content([*documents, *documents[:3], *documents], "uint16")


def damage_lengths(prefix: Path) -> None:
    with prefix.with_suffix(".idx").open("rb+") as file:
        file.seek(34)
        file.write(b"\x09")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda b: write_files(b, [[[1]]], "int32"), r"b\.idx: its tokens are of another type than those of .*a\.idx"),
        (lambda b: write_files(b, [[[1]]], "uint16", [0]), r"b\.idx: only one of it and .*a\.idx is multimodal"),
        (lambda b: None, r"b\.idx: the file is missing"),
        (
            lambda b: damage_lengths(write_files(b, [[[1], [2, 3]]], "uint16")),
            r"b\.idx: damaged: sequence 1 does",
        ),
        (lambda b: write_files(b, [[[1]]], "uint16").with_suffix(".bin").write_bytes(b"123"), r"b\.bin: too long"),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name_and_nothing_is_left(
    tmp_path: Path, prepare: object, reason: str
) -> None:
    write_files(tmp_path / "a", [[[1, 2]]], "uint16")
    assert callable(prepare)
    prepare(tmp_path / "b")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/{reason}"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == before


def test_joining_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge([], tmp_path / "whole")
    assert os.listdir(tmp_path) == []


def large(prefix: Path, size: int) -> Path:
    """A shard of one document of zeros, `size` bytes that take no place on the disk."""
    write_files(prefix, [[[]]], "uint16")
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(size)
    with prefix.with_suffix(".idx").open("rb+") as file:
        file.seek(34)
        file.write(np.array(size // 2, "<i4").tobytes())
    return prefix


def test_progress_is_told_every_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    size = 150 << 20
    large(tmp_path / "a", size)
    told: list[tuple[int, int]] = []
    merge([tmp_path / "a"], tmp_path / "b", lambda *now: told.append(now))
    assert told == [(64 << 20, size), (128 << 20, size), (size, size)]


def test_other_threads_run_while_the_native_calls_do(tmp_path: Path) -> None:
    prefix = large(tmp_path / "a", 20 << 20)
    reader = Reader(prefix)
    rows = np.zeros((100, 4097), np.int64)
    memory = BatchMemory()
    assert lets_other_threads_run(lambda: merge([prefix], tmp_path / "b"))
    assert lets_other_threads_run(lambda: reader.read(0, reader.tokens))
    assert lets_other_threads_run(reader.verify)
    assert lets_other_threads_run(lambda: assemble(rows, 0, memory))


def test_an_interrupt_ends_a_merge_and_leaves_nothing(tmp_path: Path) -> None:
    large(tmp_path / "a", 100 << 20)

    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        merge([tmp_path / "a"], tmp_path / "b", interrupt)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may map is limited on Linux only")
def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """A million documents of an index of 20 MB are joined with their like by a process that may take 8 MB more than it
    has."""
    write_files(tmp_path / "a", [], "uint16")
    count = 1_000_000
    header = (tmp_path / "a.idx").read_bytes()[:18]
    table = np.array([count, count + 1], "<u8").tobytes() + np.ones(count, "<i4").tobytes()
    table += (np.arange(count, dtype="<i8") * 2).tobytes() + np.arange(count + 1, dtype="<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(header + table)
    (tmp_path / "a.bin").write_bytes(bytes(2 * count))
    script = f"""
import resource
from pathlib import Path
from megalm._indexed_dataset import BatchMemory, Reader, assemble, merge
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (8 << 20),) * 2)
merge([{str(tmp_path / "a")!r}] * 2, {str(tmp_path / "b")!r})
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
    assert (tmp_path / "b.idx").stat().st_size == 34 + 40 * count + 8
