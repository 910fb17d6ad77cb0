from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalm.data.dataset import Source
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


def test_a_short_bin_a_corrupt_idx_and_a_missing_file_are_refused_by_name_when_opened(
    write_source: WriteSource,
) -> None:
    for name, damage in [
        ("shard-00001.bin", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("shard-00001.idx", lambda path: path.write_bytes(b"X" + path.read_bytes()[1:])),
        ("shard-00000.idx", lambda path: path.unlink()),
        ("manifest.json", lambda path: path.unlink()),
    ]:
        directory = write_source([[[1, 2, 0]], [[3, 4, 0]]], name=f"damaged-{name}")
        Source("s", directory, "f00d")
        damage(directory / name)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            Source("s", directory, "f00d")
