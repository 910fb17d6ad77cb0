"""Files with any bytes changed, cut off or added: read or refused by name, never a crash and never a wrong size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from indexed_files import CODES, Documents, content, documents_of

from megalm._indexed_dataset import OpenFiles, Reader, Stream, gather, merge
from megalm.errors import UserError

Damage = tuple[str, str, float, bytes]
"""File, what happens, where in it (0 to 1), and with which bytes."""

EXTREMES = [value.to_bytes(8, "little") for value in (0, 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1)]
DAMAGE = st.tuples(
    st.sampled_from(["bin", "idx", "idx"]),
    st.sampled_from(["overwrite", "overwrite", "overwrite", "insert", "delete", "cut"]),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=8) | st.sampled_from(EXTREMES) | st.sampled_from([e[:4] for e in EXTREMES]),
)


def damaged(whole: bytes, kind: str, where: float, new: bytes) -> bytes:
    place = round(where * len(whole))
    if kind == "cut":
        return whole[:place]
    if kind == "delete":
        return whole[:place] + whole[place + len(new) :]
    return whole[:place] + new + whole[place + (len(new) if kind == "overwrite" else 0) :]


def attempt(directory: Path, action: Callable[..., object], *arguments: object) -> bool:
    """Whether `action` succeeds; else it must be refused in one line that names a file."""
    refusal = None
    try:
        action(*arguments)
    except UserError as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith(str(directory)) and "\n" not in refusal)
    return refusal is None


def read_everything(reader: Reader) -> None:
    reader.lengths(), reader.offsets(), reader.document_starts(), reader.modes()
    assert len(reader.read(0, reader.tokens)) == reader.tokens


@settings(max_examples=300)
@given(st.sampled_from(sorted(CODES)).flatmap(lambda t: st.tuples(st.just(t), documents_of(t))), st.lists(DAMAGE))
@example(("uint16", [[[1, 2], [3]], [[4]]]), [])
def test_a_damaged_shard_is_read_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, Documents], damages: list[Damage]
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    dtype, documents = case
    parts = dict(zip(("bin", "idx"), content(documents, dtype), strict=True))
    for file, kind, where, new in damages:
        parts[file] = damaged(parts[file], kind, where, new)
    prefix = directory / "shard"
    for file, part in parts.items():
        prefix.with_suffix(f".{file}").write_bytes(part)

    intact = attempt(directory, Reader, prefix)
    if intact:
        reader = Reader(prefix)
        attempt(directory, read_everything, reader)
        attempt(directory, reader.documents_between, 0, reader.tokens // 2 + 1)
        attempt(directory, reader.documents_between, reader.tokens // 3, 2**62)
        readable = [attempt(directory, reader.document, number) for number in range(min(reader.documents, 20))]
        intact = attempt(directory, reader.verify)
        if intact:
            assert all(readable)
            assert sum(len(reader.document(n)) for n in range(reader.documents)) == reader.tokens
            assert reader.lengths().sum() == reader.tokens
    assert attempt(directory, merge, [prefix, prefix], directory / "twice") == intact
    if intact:
        Reader(directory / "twice").verify()
    assert intact or damages
    expected = sum(len(sequence) for document in documents for sequence in document)
    if dtype in ("uint16", "int32"):
        gather_damaged(directory, parts["bin"], expected, dtype)


def gather_damaged(directory: Path, tokens: bytes, expected: int, dtype: str) -> None:
    """A training sample of a .bin of any content is its tokens, or it is refused."""
    vocab_size = 1000
    stream = Stream(OpenFiles(1), directory, ["shard"], [expected], dtype, vocab_size)
    out = np.full(expected, -1, np.int64)
    piece = (np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([expected]))
    read = attempt(directory, gather, {0: stream}, *piece, 0, out)
    if len(tokens) == expected * np.dtype(dtype).itemsize:
        stored = np.frombuffer(tokens, np.dtype(dtype).newbyteorder("<"))
        assert read == bool(((stored >= 0) & (stored < vocab_size)).all())
        assert not read or np.array_equal(out, stored)
    else:
        assert not read or expected == 0
