from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import write_prepared
from unlocked import lets_other_threads_run

from megalm.data.dataset import OpenFiles, Source, gather_pieces
from megalm.errors import UserError

WriteSource = Callable[..., Path]


def read(source: Source, start: int, count: int) -> list[int]:
    out = np.full(count, -1, np.int64)
    source.read(start, out)
    return out.tolist()


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_shards_are_read_as_one_stream_wherever_a_window_lies(write_source: WriteSource, dtype: str) -> None:
    shards = [[[5, 6, 0], [7, 0]], [], [[8, 0]], [[9, 10, 11, 0]]]
    source = Source("s", write_source(shards, dtype=dtype, vocab_size=60000), "f00d")
    stream = [5, 6, 0, 7, 0, 8, 0, 9, 10, 11, 0]
    assert source.tokens == len(stream)
    for start in range(len(stream)):
        for count in range(1, len(stream) - start + 1):
            assert read(source, start, count) == stream[start : start + count]


def test_ids_above_32767_are_read_as_they_are(write_source: WriteSource) -> None:
    assert read(Source("s", write_source([[[65000, 40000, 0]]], dtype="uint16", vocab_size=65001), "f00d"), 0, 3) == [
        65000,
        40000,
        0,
    ]


@pytest.fixture
def stream_of(write_source: WriteSource) -> Callable[[int], Source]:
    return lambda tokens: Source("code", write_source([[range(tokens)]], name=f"tokens-{tokens}"), "f00d")


@pytest.mark.parametrize(("length", "held_out"), [(10, 0), (10, 3), (7, 1), (1, 5), (99, 0), (32, 2)])
def test_a_split_leaves_no_token_to_both_sides_and_wastes_less_than_a_window(
    stream_of: Callable[[int], Source], length: int, held_out: int
) -> None:
    source = stream_of(100)
    split = source.split(length, held_out)
    last_of_training = split.slack + split.training * length
    assert last_of_training == split.held_out_start - 1
    assert 0 <= split.slack < length
    assert split.training >= 1
    last_of_held_out = split.held_out_start + held_out * length if held_out else split.held_out_start - 1
    assert last_of_held_out == source.tokens - 1


@pytest.mark.parametrize("tokens", range(45))
def test_data_that_is_too_short_is_refused_exactly_when_no_training_window_is_left(
    stream_of: Callable[[int], Source], tokens: int
) -> None:
    source = stream_of(tokens)
    for length in (1, 3, 10):
        for held_out in (0, 1, 2, 5):
            held_out_tokens = held_out * length + 1 if held_out else 0
            if tokens - held_out_tokens > length:
                assert source.split(length, held_out).training >= 1
            else:
                with pytest.raises(UserError):
                    source.split(length, held_out)


def test_a_sequence_longer_than_the_data_says_how_many_tokens_there_are_and_are_needed(
    stream_of: Callable[[int], Source],
) -> None:
    with pytest.raises(UserError, match=r"'code' .*has 100 tokens.*sequence_length=90 needs 91.*samples=2.*need 181"):
        stream_of(100).split(90, 2)


def test_another_tokenizers_data_are_refused(write_source: WriteSource) -> None:
    directory = write_source([[[1, 2, 0]]], tokenizer_fingerprint="abc")
    with pytest.raises(UserError, match=rf"{directory}: .*'tokenizers/test'.*abc.*f00d"):
        Source("s", directory, "f00d")


@pytest.mark.parametrize(("dtype", "wrong"), [("int32", 300), ("int32", -5), ("uint16", 300), ("uint16", 65535)])
def test_an_id_outside_of_the_vocabulary_is_refused_with_file_and_offset(
    write_source: WriteSource, dtype: str, wrong: int
) -> None:
    shards = [[[1, 2, 3, 0]], [[4, 5, 0], [6, wrong, 7, 0]]]
    directory = write_source(shards, dtype=dtype, vocab_size=300)
    source = Source("s", directory, "f00d")
    assert read(source, 0, 8) == [1, 2, 3, 0, 4, 5, 0, 6]
    offset = 4 * np.dtype(dtype).itemsize
    with pytest.raises(UserError, match=rf"{directory}/shard-00001\.bin: damaged.* byte {offset} is {wrong}, .*300"):
        read(source, 2, 8)


def test_opening_a_source_reads_its_manifest_and_no_other_file(write_source: WriteSource) -> None:
    directory = write_source([[[1, 2, 0]], [[3, 4, 0]]])
    for path in directory.glob("shard-*"):
        path.unlink()
    assert Source("s", directory, "f00d").tokens == 6
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json"):
        Source("s", directory, "f00d")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "too short: 11 bytes, while the manifest tells of 12"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long: 13 bytes"),
        (lambda path: path.unlink(), "the file is missing"),
    ],
)
def test_a_bin_that_is_not_what_the_manifest_says_is_refused_by_name_when_it_is_read(
    write_source: WriteSource, damage: Callable[[Path], None], reason: str
) -> None:
    directory = write_source([[[1, 2, 0]], [[3, 4, 0]]])
    source = Source("s", directory, "f00d")
    damage(directory / "shard-00001.bin")
    assert read(source, 0, 3) == [1, 2, 0]
    with pytest.raises(UserError, match=rf"{directory}/shard-00001\.bin: {reason}"):
        read(source, 2, 2)


def test_a_bin_that_shrinks_while_it_is_open_is_refused_by_name(write_source: WriteSource) -> None:
    directory = write_source([[[*range(1, 50_000), 0]]])
    source = Source("s", directory, "f00d")
    assert read(source, 40_000, 1) == [40_001]
    with (directory / "shard-00000.bin").open("rb+") as file:
        file.truncate(80_000)
    assert read(source, 19_999, 1) == [20_000]
    with pytest.raises(UserError, match=rf"{directory}/shard-00000\.bin: too short: it ends at byte 80000"):
        read(source, 19_999, 2)


def test_a_source_tells_where_its_documents_start_over_shards(write_source: WriteSource) -> None:
    shards = [[[1] * n for n in (3, 0, 2, 5)], [], [[2] * 4], [[], [3], [4, 4], []]]
    source = Source("one", write_source(shards), "f00d")
    starts = [0, 3, 3, 5, 10, 14, 14, 15]
    for first in range(18):
        for end in range(first, 19):
            assert source.document_starts(first, end).tolist() == [s for s in starts if first <= s < end]
    assert source.sequence_lengths().tolist() == [3, 0, 2, 5, 4, 0, 1, 2, 0]
    assert Source("none", write_source([], name="none"), "f00d").sequence_lengths().tolist() == []


def open_under(directory: Path) -> list[str]:
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
    return sorted(Path(link).name for link in links if link.startswith(str(directory)))


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells which files are open")
def test_sources_together_keep_no_more_files_open_than_they_may_and_the_last_used_ones(
    write_source: WriteSource, tmp_path: Path
) -> None:
    files = OpenFiles(2)
    one = Source("one", write_source([[[1]], [[2]], [[3]]], name="one"), "f00d", files)
    two = Source("two", write_source([[[4]], [[5]]], name="two"), "f00d", files)
    assert open_under(tmp_path) == []
    assert read(one, 0, 3) == [1, 2, 3]
    assert open_under(tmp_path) == ["shard-00001.bin", "shard-00002.bin"]
    assert read(one, 1, 1) == [2]
    assert read(two, 0, 1) == [4]
    assert open_under(tmp_path) == ["shard-00000.bin", "shard-00001.bin"]
    assert [read(one, 0, 3), read(two, 0, 2)] == [[1, 2, 3], [4, 5]]
    del one, two, files
    assert open_under(tmp_path) == []


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[list[list[int]]]], list[tuple[int, int, int]]]:
    """Sources as shards of documents, and pieces of them."""
    document = st.lists(st.integers(0, 65499), min_size=1, max_size=9)
    shards = st.lists(st.lists(document, max_size=3), max_size=4)
    sources = draw(st.lists(shards, min_size=1, max_size=3))
    pieces = []
    for _ in range(draw(st.integers(0, 8))):
        source = draw(st.integers(-1, len(sources) - 1))
        if source == -1:
            pieces.append((-1, draw(st.integers(-5, 5)), draw(st.integers(0, 5))))
        else:
            tokens = sum(len(document) for shard in sources[source] for document in shard)
            start = draw(st.integers(0, tokens))
            pieces.append((source, start, draw(st.integers(0, tokens - start))))
    return sources, pieces


@settings(max_examples=50)
@given(batches(), st.integers(0, 60_000))
def test_pieces_are_slices_of_the_sources_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[list[list[list[list[int]]]], list[tuple[int, int, int]]],
    eod: int,
) -> None:
    contents, pieces = case
    sources, expected = [], []
    for number, shards in enumerate(contents):
        dtype = ("int32", "uint16")[number % 2]
        directory = write_prepared(tmp_path_factory.mktemp("s") / "d", shards, dtype=dtype, vocab_size=65500)
        sources.append(Source(str(number), directory, "f00d"))
    for number, start, length in pieces:
        stream = [token for shard in contents[number] for document in shard for token in document]
        expected += [eod] * length if number == -1 else stream[start : start + length]
    out = np.full(len(expected), -1, np.int64)
    columns = np.array(pieces, np.int64).reshape(-1, 3).T.copy()
    gather_pieces(sources, *columns, eod, out)
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("pieces", "size", "reason"),
    [
        ([(0, 0, 4)], 4, "piece 0 is 4 tokens from token 0, while source 0 has 3"),
        ([(0, 0, 1), (0, 4, 0)], 1, "piece 1 is 0 tokens from token 4"),
        ([(0, -1, 2)], 2, "piece 0 is 2 tokens from token -1"),
        ([(0, 2**62, 2)], 2, "piece 0 is 2 tokens from token"),
        ([(0, 0, -1)], 0, "piece 0 has -1 tokens"),
        ([(0, 0, 2), (-1, 0, 2)], 3, "piece 1 has 2 tokens, while 1 are left to fill"),
        ([(0, 0, 2)], 3, "leave 1 tokens to fill"),
    ],
)
def test_pieces_that_are_not_there_or_do_not_fit_are_refused_before_anything_is_written(
    write_source: WriteSource, pieces: list[tuple[int, int, int]], size: int, reason: str
) -> None:
    source = Source("s", write_source([[[7, 8, 0]]]), "f00d")
    out = np.full(size, -1, np.int64)
    with pytest.raises(ValueError, match=reason):
        gather_pieces([source], *np.array(pieces, np.int64).T.copy(), 0, out)
    assert (out == -1).all()


def test_pieces_are_read_from_and_into_unaligned_arrays(write_source: WriteSource) -> None:
    source = Source("s", write_source([[[7, 8, 0]]]), "f00d")

    def unaligned(values: list[int]) -> np.ndarray:
        array = np.frombuffer(bytearray(b"x" + np.array(values, np.int64).tobytes()), np.int64, offset=1)
        assert not array.flags.aligned
        return array

    out = unaligned([-1] * 4)
    gather_pieces([source], unaligned([0, -1]), unaligned([1, 0]), unaligned([2, 2]), 9, out)
    assert out.tolist() == [8, 0, 9, 9]


def test_other_threads_run_while_pieces_are_gathered(write_source: WriteSource) -> None:
    tokens = 1_000_000
    source = Source("s", write_source([[np.zeros(tokens, np.int32)]]), "f00d")
    out = np.empty(tokens, np.int64)
    assert lets_other_threads_run(lambda: source.read(0, out))


def test_threads_that_share_open_files_read_what_is_there(write_source: WriteSource) -> None:
    shards = [[[shard * 100 + i for i in range(100)]] for shard in range(8)]
    source = Source("s", write_source(shards), "f00d", OpenFiles(2))

    def read_all(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, 700, 300)
        return all(read(source, start, 90) == list(range(start, start + 90)) for start in starts.tolist())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(4)))
