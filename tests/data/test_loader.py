from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalm.data.dataset import Source
from megalm.data.fim import FillInTheMiddle
from megalm.data.loader import Loader, MicroBatch
from megalm.data.order import OrderOptions, Stage
from megalm.data.trace import hash_of, rolled
from megalm.errors import UserError

WriteSource = Callable[..., Path]
EOD = 0


def make_loader(directories: list[Path], **changed: object) -> Loader:
    settings: dict = {
        "weights": [float(len(directories) - i) for i in range(len(directories))],
        "sequence_length": 16,
        "seed": 3,
        "eod": EOD,
        "document_attention": True,
        "validation_samples": 4,
    }
    return Loader([Source(d.name, d, "f00d") for d in directories], **{**settings, **changed})


@pytest.fixture
def directories(write_source: WriteSource) -> list[Path]:
    """Two sources of random documents, in several shards."""
    random = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        return [[*random.integers(1, 500, random.integers(0, 40)).tolist(), EOD] for _ in range(count)]

    return [
        write_source([documents(20), documents(1), documents(25)], name="code", vocab_size=500),
        write_source([documents(30)], name="docs", vocab_size=500, dtype="uint16"),
    ]


@pytest.fixture
def loader(directories: list[Path]) -> Loader:
    return make_loader(directories)


def assert_equal(one: MicroBatch, other: MicroBatch) -> None:
    for field in ("tokens_T", "labels_T", "loss_mask_T", "positions_T", "segments", "sources_B"):
        assert np.array_equal(getattr(one, field), getattr(other, field)), field
    assert one.sequence_length == other.sequence_length


def join(parts: list[MicroBatch]) -> MicroBatch:
    ends = np.cumsum([0, *[len(part.tokens_T) for part in parts]])
    segments = [part.segments[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
    flat = {
        field: np.concatenate([getattr(part, field) for part in parts])
        for field in ("tokens_T", "labels_T", "loss_mask_T", "positions_T", "sources_B")
    }
    return MicroBatch(segments=np.concatenate([[0], *segments]), sequence_length=parts[0].sequence_length, **flat)


def test_samples_do_not_depend_on_how_they_are_cut_into_micro_batches(loader: Loader) -> None:
    whole = loader.micro_batch(5, 300)
    for sizes in ([1] * 300, [7, 93, 1, 199], [299, 1]):
        starts = np.cumsum([5, *sizes])
        parts = [loader.micro_batch(int(start), size) for start, size in zip(starts[:-1], sizes, strict=True)]
        assert_equal(join(parts), whole)
    assert set(whole.sources_B.tolist()) == {0, 1}


def test_two_loaders_with_the_same_settings_give_the_same_samples(directories: list[Path], loader: Loader) -> None:
    again = make_loader(directories)
    assert again.fingerprint == loader.fingerprint
    assert_equal(again.micro_batch(1000, 20), loader.micro_batch(1000, 20))


def test_each_epoch_visits_each_training_window_once_and_never_a_held_out_token(write_source: WriteSource) -> None:
    # Every token is its own place in the stream, so what is read says where it was read.
    length, held_out = 10, 5
    streams = [[[*range(90)], [*range(90, 207)]], [[*range(1000, 1131)]]]
    directories = [
        write_source([[document] for document in streams[0]], name="one"),
        write_source([streams[1]], name="two"),
    ]
    loader = make_loader(
        directories,
        weights=[1, 1],
        sequence_length=length,
        validation_samples=held_out,
        document_attention=False,
    )
    batch = loader.micro_batch(0, 2000)
    held_out_tokens = {
        name: {token for part in parts for token in [*part.tokens_T.tolist(), *part.labels_T.tolist()]}
        for name, parts in loader.validation(2)
    }
    for number, (name, base, total) in enumerate([("one", 0, 207), ("two", 1000, 131)]):
        mine = batch.sources_B == number
        tokens = batch.tokens_T.reshape(-1, length)[mine]
        labels = batch.labels_T.reshape(-1, length)[mine]
        assert np.array_equal(labels, tokens + 1)
        assert (np.diff(tokens, axis=1) == 1).all()

        first_held_out = base + total - held_out * length - 1
        assert held_out_tokens[name] == set(range(first_held_out, base + total))
        assert labels.max() < first_held_out
        assert tokens.min() >= base

        windows = (total - held_out * length - 1 - 1) // length
        phases = set()
        for epoch in tokens[: len(tokens) // windows * windows, 0].reshape(-1, windows):
            phases.add(int(epoch.min()))
            assert sorted(epoch.tolist()) == [epoch.min() + length * window for window in range(windows)]
        assert len(phases) > 1


def test_validation_reads_the_held_out_windows_in_order_whatever_the_micro_size(write_source: WriteSource) -> None:
    directory = write_source([[range(1, 100)]], name="one")
    for micro_size, sizes in [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (64, [5])]:
        loader = make_loader([directory], sequence_length=8, validation_samples=5)
        [(name, batches)] = loader.validation(micro_size)
        batches = list(batches)
        assert name == "one"
        assert [len(batch.sources_B) for batch in batches] == sizes
        assert join(batches).tokens_T.tolist() == list(range(59, 99))
        assert join(batches).labels_T.tolist() == list(range(60, 100))
    assert [(n, list(b)) for n, b in make_loader([directory], validation_samples=0).validation(4)] == [("one", [])]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_the_stream_gives_each_global_batch_as_its_micro_batches(directories: list[Path], prefetch: int) -> None:
    loader = make_loader(directories, prefetch=prefetch)
    sizes = [[2, 2], [3], [1, 1, 2], [5, 5]]
    steps = [samples.parts for samples in loader.stream(40, sizes)]
    assert [[len(batch.sources_B) for batch in step] for step in steps] == sizes
    start = 40
    for step in steps:
        for batch in step:
            assert_equal(batch, loader.micro_batch(start, len(batch.sources_B)))
            start += len(batch.sources_B)


@pytest.mark.parametrize("resumed", range(11))
def test_a_stream_taken_up_anywhere_continues_the_uninterrupted_one(loader: Loader, resumed: int) -> None:
    sizes = [[2, 2], [4], [1, 3], [2, 2, 2], [6], [3, 3], [4, 4], [8], [1] * 8, [8]]
    uninterrupted = list(loader.stream(0, sizes))
    rest = list(loader.stream(sum(map(sum, sizes[:resumed])), sizes[resumed:]))
    for step, expected in zip(rest, uninterrupted[resumed:], strict=True):
        assert np.array_equal(step.source_B, expected.source_B)
        assert np.array_equal(step.rank_B, expected.rank_B)
        for batch, other in zip(step.parts, expected.parts, strict=True):
            assert_equal(batch, other)


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("megalm-data")]


def endless() -> Iterator[list[int]]:
    while True:
        yield [2]


def test_closing_or_dropping_or_finishing_a_stream_leaves_no_thread(loader: Loader) -> None:
    stream = loader.stream(0, endless())
    next(stream)
    assert data_threads()
    stream.close()
    assert not data_threads()

    stream = loader.stream(0, endless())
    next(stream)
    del stream
    assert not data_threads()

    assert len(list(loader.stream(0, [[1], [1]]))) == 2
    assert not data_threads()


def test_the_stream_reads_no_farther_ahead_than_it_is_told(directories: list[Path]) -> None:
    asked = []

    def sizes() -> Iterator[list[int]]:
        for step in range(100):
            asked.append(step)
            yield [1]

    stream = make_loader(directories, prefetch=3).stream(0, sizes())
    for step in range(10):
        next(stream)
        assert len(asked) == step + 1 + 3
    stream.close()


def test_an_error_in_the_thread_reaches_the_reader_at_the_batch_it_is_about(write_source: WriteSource) -> None:
    directory = write_source([[[*range(1, 400), 100_000, *range(1, 400)]]], name="one", vocab_size=500)
    loader = make_loader([directory], validation_samples=0)
    bad = next(i for i in range(49) if _is_damaged(loader, i))
    stream = loader.stream(0, endless())
    for _ in range(bad // 2):
        next(stream)
    with pytest.raises(UserError, match=r"one/shard-00000\.bin: damaged.*byte 1596 is 100000"):
        next(stream)
    assert not data_threads()


def _is_damaged(loader: Loader, sample: int) -> bool:
    try:
        loader.micro_batch(sample, 1)
    except UserError:
        return True
    return False


def test_the_fingerprint_changes_with_all_that_decides_the_order_and_nothing_else(
    directories: list[Path], write_source: WriteSource
) -> None:
    usual = make_loader(directories).fingerprint
    same = [{"weights": [4.0, 2.0]}, {"prefetch": 7}, {"document_attention": False}]
    assert {make_loader(directories, **changed).fingerprint for changed in same} == {usual}
    other: list[dict] = [
        {"weights": [2.0, 1.5]},
        {"sequence_length": 17},
        {"seed": 4},
        {"validation_samples": 5},
    ]
    changed = [make_loader(directories, **change).fingerprint for change in other]
    changed.append(make_loader(directories[::-1]).fingerprint)
    changed.append(make_loader([directories[0], write_source([[[1] * 200]], name="other")]).fingerprint)
    assert len({usual, *changed}) == 7


def test_the_samples_of_each_source_keep_to_its_weight_in_every_prefix(loader: Loader) -> None:
    first = np.cumsum(loader.micro_batch(0, 900).sources_B == 0)
    assert np.abs(first - np.arange(1, 901) * 2 / 3).max() < 1


def test_two_sources_of_one_name_are_refused(directories: list[Path]) -> None:
    with pytest.raises(UserError, match=r"'code' is the name of more than one source"):
        make_loader([directories[0], directories[0]])


def test_a_source_that_is_too_short_is_refused(directories: list[Path]) -> None:
    with pytest.raises(UserError, match=r"'code'.*sequence_length=100000"):
        make_loader(directories, sequence_length=100_000)


def test_opening_and_tracing_a_runs_data_do_not_import_torch() -> None:
    code = "import sys, megalm.data.open, megalm.data.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


MODES = [OrderOptions(), OrderOptions("window", window_tokens=64), OrderOptions("megatron", split="1", samples=600)]
STAGES = [Stage("first", {0: 0.8, 1: 0.2}, 60), Stage("second", {1: 1.0}, 30), Stage("third", {0: 0.5, 1: 0.5}, None)]
FIM = FillInTheMiddle(rate=0.9, spm_rate=0.5, prefix=497, middle=498, suffix=499)


def mode_loader(directories: list[Path], options: OrderOptions, **changed: object) -> Loader:
    changed = {"validation_samples": 0, "options": options, "fim": FIM, **changed}
    if options.mode != "megatron":
        changed["weights"] = STAGES
    return make_loader(directories, **changed)


@pytest.mark.parametrize("options", MODES, ids=lambda options: options.mode)
@pytest.mark.parametrize(("ranks", "micro", "workers"), [(1, 24, 1), (2, 3, 2), (4, 6, 3), (3, 1, 1), (6, 2, 4)])
def test_the_global_order_and_its_hash_do_not_depend_on_ranks_micro_batches_or_workers(
    directories: list[Path], options: OrderOptions, ranks: int, micro: int, workers: int
) -> None:
    start, size, steps = 30, 24, 4
    plain = mode_loader(directories, options)
    sizes = [[micro] * (size // ranks // micro)] * steps
    shares = [
        list(mode_loader(directories, options, workers=workers).stream(start, sizes, rank, ranks))
        for rank in range(ranks)
    ]
    for step in range(steps):
        whole = plain.micro_batch(start + step * size, size)
        assert_equal(join([part for share in shares for part in share[step].parts]), whole)
    before = hash_of(plain, start)
    for share in shares:
        data_hash = before
        for batch in share:
            data_hash = rolled(data_hash, batch.source_B, batch.rank_B)
        assert data_hash == hash_of(plain, start + steps * size)


@pytest.mark.parametrize("options", MODES, ids=lambda options: options.mode)
def test_each_mode_gives_the_same_samples_at_random_as_in_sequence(
    directories: list[Path], options: OrderOptions
) -> None:
    sequence = mode_loader(directories, options).micro_batch(0, 120)
    again = mode_loader(directories, options)
    for sample in np.random.default_rng(0).permutation(120).tolist():
        one = again.micro_batch(sample, 1)
        assert np.array_equal(one.tokens_T, sequence.tokens_T[sample * 16 : (sample + 1) * 16])
        assert one.sources_B[0] == sequence.sources_B[sample]


def test_every_option_of_the_order_changes_the_fingerprint(directories: list[Path]) -> None:
    loaders = [mode_loader(directories, options, fim=fim) for options in MODES for fim in (None, FIM)]
    loaders.append(mode_loader(directories, OrderOptions("window", window_tokens=128)))
    loaders.append(mode_loader(directories, OrderOptions("megatron", split="2,1", samples=600)))
    loaders.append(mode_loader(directories, OrderOptions("megatron", split="1", samples=601)))
    loaders.append(make_loader(directories, weights=STAGES[1:]))
    loaders.append(make_loader(directories, weights=[replace(STAGES[0], samples=61), *STAGES[1:]]))
    assert len({loader.fingerprint for loader in loaders}) == len(loaders)


def test_finishing_is_done_in_the_thread_that_prepares(directories: list[Path]) -> None:
    threads = []

    def finish(batch: MicroBatch) -> MicroBatch:
        threads.append(threading.current_thread().name)
        return replace(batch, sequence_length=-1)

    [samples] = make_loader(directories).stream(0, [[2, 2]], finish=finish)
    assert [part.sequence_length for part in samples.parts] == [-1, -1]
    assert all(name.startswith("megalm-data") for name in threads)
    assert len(threads) == 2


def test_padding_and_documents_of_window_mode_reach_the_batch_as_text_and_ends(directories: list[Path]) -> None:
    loader = make_loader(directories, options=OrderOptions("window", window_tokens=64), validation_samples=0)
    pieces = loader.order.pieces(0, 200)
    batch = loader.micro_batch(0, 200)
    sequences = np.concatenate([batch.tokens_T.reshape(-1, 16), batch.labels_T.reshape(-1, 16)[:, -1:]], axis=1)
    sources = [Source(d.name, d, "f00d") for d in directories]
    expected: list[int] = []
    for source, start, length in zip(pieces.source_P, pieces.start_P, pieces.length_P, strict=True):
        row = np.full(length, EOD)
        if source >= 0:
            sources[source].read(int(start), row)
        expected += row.tolist()
    assert sequences.reshape(-1).tolist() == expected
