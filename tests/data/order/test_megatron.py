"""Order `megatron` against megatron-core itself: its datasets, built by its own builder, on random sources."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm._order import blend
from megalm.data.dataset import Source, gather_pieces
from megalm.data.loader import Loader
from megalm.data.order import OrderOptions
from megalm.data.order.megatron import MegatronBlend, SourceIndex, training_documents
from megalm.errors import UserError

WriteSource = Callable[..., Path]
EOD = 0
slow_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def megatron() -> SimpleNamespace:
    """What is needed of megatron-core, which takes seconds to import and warns of what it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import blended_megatron_dataset_builder as builder
        from megatron.core.datasets import blended_megatron_dataset_config as config
        from megatron.core.datasets import gpt_dataset, helpers
    return SimpleNamespace(builder=builder, config=config, gpt=gpt_dataset, helpers=helpers)


def documents(random: np.random.Generator, count: int) -> list[list[int]]:
    return [[*random.integers(1, 400, random.integers(0, 30)).tolist(), EOD] for _ in range(count)]


def their_dataset(
    megatron: SimpleNamespace, prefixes: list[str], weights: list[float] | None, samples: int, **settings: Any
) -> Any:
    tokenizer = SimpleNamespace(vocab_size=500, eod=EOD, pad=499, unique_identifiers={"class": "test"})
    config = megatron.gpt.GPTDatasetConfig(
        blend=(prefixes, weights),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **settings,
    )
    config.split_matrix = [config.split_matrix[0], None, None]  # it never ends on a part without documents
    build = megatron.builder.BlendedMegatronDatasetBuilder(
        megatron.gpt.GPTDataset, [samples, 0, 0], lambda: True, config
    )
    return build.build()[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    sources=st.integers(1, 4),
    samples=st.integers(1, 150),
    length=st.integers(2, 40),
    split=st.sampled_from(["969,30,1", "1", "50,50,0", "0.9,.1", "7,2,1"]),
)
@settings(parent=slow_fixture, max_examples=25)
def test_a_run_sees_the_samples_that_megatron_gives_it(
    megatron: SimpleNamespace,
    write_source: WriteSource,
    tmp_path: Path,
    seed: int,
    sources: int,
    samples: int,
    length: int,
    split: str,
) -> None:
    random = np.random.default_rng(seed)
    weights = random.random(sources).clip(0.05).tolist()
    ours, theirs = [], []
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    for number in range(sources):
        shards = [documents(random, int(random.integers(20, 60))) for _ in range(random.integers(1, 3))]
        ours.append(write_source(shards, name=str(root / f"s{number}"), vocab_size=500, dtype="uint16"))
        merged = [document for shard in shards for document in shard]
        theirs.append(write_source([merged], name=str(root / f"merged-{number}"), vocab_size=500, dtype="uint16"))
    prefixes = [str(directory / "shard-00000") for directory in theirs]
    dataset = their_dataset(
        megatron,
        prefixes,
        weights if sources > 1 else None,
        samples,
        random_seed=seed,
        sequence_length=length,
        split=split,
    )
    loader = Loader(
        [Source(directory.name, directory, "f00d") for directory in ours],
        weights,
        length,
        seed,
        EOD,
        True,
        0,
        options=OrderOptions("megatron", split=split, samples=samples),
    )
    batch = loader.micro_batch(0, samples)
    for i in range(samples):
        mine, other = slice(i * length, (i + 1) * length), dataset[i]
        assert batch.tokens_T[mine].tolist() == other["tokens"].tolist()
        assert batch.labels_T[mine].tolist() == other["labels"].tolist()
    if sources > 1:
        assert batch.sources_B.tolist() == [dataset[i]["dataset_id"] for i in range(samples)]
    shutil.rmtree(root)


@given(
    lengths=st.lists(st.integers(0, 60), min_size=2, max_size=60).filter(lambda lengths: sum(lengths) > 45),
    samples=st.integers(1, 300),
    length=st.integers(2, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_three_indices_are_megatrons(
    megatron: SimpleNamespace, lengths: list[int], samples: int, length: int, seed: int
) -> None:
    sizes = np.array(lengths, np.int32)
    index = SourceIndex(sizes, len(sizes), samples, length, seed)
    # The dataset's own method, on the attributes that it reads.
    dataset = object.__new__(megatron.gpt.GPTDataset)
    dataset.config = SimpleNamespace(
        defer_npy_index_mmap=False,
        path_to_cache=None,
        mock=True,
        sequence_length=length,
        add_extra_token_to_sequence=1,
        random_seed=seed,
    )
    dataset.dataset = SimpleNamespace(sequence_lengths=sizes)
    dataset.indices = np.arange(len(sizes), dtype=np.int32)
    dataset.num_samples, dataset.index_split = samples, SimpleNamespace(name="train")
    document_index, sample_index, shuffle_index = dataset._build_document_sample_shuffle_indices()
    for one, other in ((index.document_index, document_index), (index.shuffle_index, shuffle_index)):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    starts = np.cumsum(sizes) - sizes
    for rank, sample in enumerate(shuffle_index[:100].tolist()):
        (first, skip), (last, end) = sample_index[sample : sample + 2].tolist()
        pieces = []  # Megatron's: from a token of one document to a token of another, that one included
        for position in range(first, last + 1):
            document = document_index[position]
            start = skip if position == first else 0
            stop = end + 1 if position == last else sizes[document]
            pieces.append((starts[document] + start, stop - start))
        assert index.pieces(rank) == [(start, tokens) for start, tokens in pieces if tokens]


@given(weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=40), samples=st.integers(0, 2000))
def test_blending_is_megatrons(megatron: SimpleNamespace, weights: list[float], samples: int) -> None:
    normalised = np.array(weights) / np.sum(np.array(weights))
    source, rank = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    megatron.helpers.build_blending_indices(source, rank, normalised, len(weights), samples, False)
    ours = blend(normalised, samples)
    assert np.array_equal(ours[0], source)
    assert np.array_equal(ours[1], rank)


@given(
    split=st.lists(st.floats(0, 1000).map(lambda x: f"{x:.3f}"), min_size=1, max_size=3),
    documents=st.integers(1, 10**9),
)
def test_a_split_takes_as_many_documents_as_megatrons(
    megatron: SimpleNamespace, split: list[str], documents: int
) -> None:
    if float(split[0]) == 0:
        split[0] = "1.000"
    vector = megatron.config.parse_and_normalize_split(",".join(split))
    [(begin, end), *_] = megatron.config.convert_split_vector_to_split_matrix(vector)
    assert begin == 0
    assert training_documents(",".join(split), documents) == round(end * float(documents))


def test_each_sample_of_an_epoch_is_drawn_once(write_source: WriteSource) -> None:
    directory = write_source([[[*range(i * 10, i * 10 + 10)] for i in range(40)]], name="one")
    source = Source("one", directory, "f00d")
    index = SourceIndex(source.sequence_lengths(), 40, 1, 7, seed=5)
    assert (index.epochs, index.samples) == (1, 399 // 7)
    firsts = []
    for rank in range(index.samples):
        start, length = np.ascontiguousarray(np.array(index.pieces(rank)).T)
        tokens = np.empty(8, np.int64)
        gather_pieces([source], np.zeros_like(start), start, length, EOD, tokens)
        firsts.append(tokens[:7].tolist())
    seen = [token for row in firsts for token in row]
    assert len(set(seen)) == len(seen) == 399 // 7 * 7


def test_nothing_is_drawn_past_the_samples_that_the_order_was_built_for() -> None:
    for weights in ([1.0], [1.0, 2.0]):
        mixture = MegatronBlend(weights, 100)
        assert mixture.drawn(100).sum() == 100
        assert np.array_equal(mixture.drawn(70), np.bincount(mixture.locate(np.arange(70))[0], minlength=len(weights)))
        with pytest.raises(IndexError):
            mixture.locate(100)


def test_a_split_that_leaves_no_sample_or_reaches_into_what_is_held_out_is_refused(write_source: WriteSource) -> None:
    source = Source("code", write_source([documents(np.random.default_rng(0), 50)], vocab_size=500), "f00d")

    def load(split: str, held_out: int) -> Loader:
        options = OrderOptions("megatron", split=split, samples=9)
        return Loader([source], [1.0], 16, 1, EOD, True, held_out, options=options)

    load("1,1", 4)
    with pytest.raises(UserError, match=r"data\.split='1,99' trains on 0 of the 50 documents of source 'code'"):
        load("1,99", 0)
    with pytest.raises(UserError, match=r"data\.split='99,1' .*'code', of which the last \d+ are among its .*=4"):
        load("99,1", 4)
