"""Files go both ways between this package and megatron-core: what the one writes, the other reads."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed_files import Documents, documents_of, read_files, write_files

from megalm._indexed_dataset import Reader, Writer, merge

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it lacks on a machine without a GPU
    from megatron.core.datasets import indexed_dataset as megatron

DTYPES = ["uint16", "int32"]


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_to_collect() -> Iterator[None]:
    """Their builder collects garbage with every part that it adds, a third of a second where much was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def theirs(prefix: Path, documents: Documents, dtype: str, multimodal: bool = False) -> Path:
    """Written by their builder, document by document, each sequence's mode its length."""
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", getattr(np, dtype), multimodal)
    for document in documents:
        tokens = np.array([token for sequence in document for token in sequence], np.int64)
        lengths = [len(sequence) for sequence in document]
        builder.add_document(tokens, lengths, lengths if multimodal else None)
    builder.finalize(f"{prefix}.idx")
    return prefix


def read_by_them(prefix: Path, multimodal: bool = False) -> list[list[list[int]]]:
    dataset = megatron.IndexedDataset(str(prefix), multimodal=multimodal, mmap=False)  # mmap refuses an empty .bin
    starts = dataset.document_indices.tolist()
    sequences = [dataset[i][0].tolist() if multimodal else dataset[i].tolist() for i in range(len(dataset))]
    return [sequences[start:end] for start, end in pairwise(starts)]


@settings(max_examples=40)
@given(st.data(), st.sampled_from([*DTYPES, "uint8", "int8", "int16", "int64"]), st.booleans())
def test_what_their_builder_writes_is_read_here(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, multimodal: bool
) -> None:
    documents = data.draw(documents_of(dtype))
    reader = Reader(theirs(tmp_path_factory.mktemp("theirs") / "shard", documents, dtype, multimodal))
    reader.verify()
    assert (reader.dtype, reader.documents) == (dtype, len(documents))
    for number, document in enumerate(documents):
        assert reader.document(number).tolist() == [token for sequence in document for token in sequence]
    lengths = [len(sequence) for document in documents for sequence in document]
    assert reader.lengths().tolist() == lengths
    if multimodal:
        assert reader.modes().tolist() == lengths


@settings(max_examples=30)
@given(st.data(), st.sampled_from(DTYPES))
def test_what_the_writer_here_writes_is_read_by_them_and_is_what_they_write(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str
) -> None:
    directory = tmp_path_factory.mktemp("ours")
    largest = int(np.iinfo(dtype).max)
    texts = data.draw(st.lists(st.lists(st.integers(0, largest), min_size=1, max_size=9), min_size=1, max_size=8))
    with Writer(directory / "ours", dtype) as writer:
        tokens = np.array([token for text in texts for token in text], np.uint32)
        writer.append(tokens, np.array([len(text) for text in texts]))
    documents = [[text] for text in texts]
    assert read_by_them(directory / "ours") == documents
    assert read_files(directory / "ours") == read_files(theirs(directory / "theirs", documents, dtype))


@settings(max_examples=30)
@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_a_merge_is_their_merge_byte_for_byte_and_is_read_by_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, multimodal: bool
) -> None:
    directory = tmp_path_factory.mktemp("merge")
    parts = data.draw(st.lists(documents_of(dtype, 4), min_size=1, max_size=4))
    if multimodal:  # of a part without a sequence nothing tells whether it has modes
        parts = [[[[1], [2]], *part] for part in parts]
    prefixes = [theirs(directory / f"part{i}", part, dtype, multimodal) for i, part in enumerate(parts)]
    merge(prefixes, directory / "ours")
    builder = megatron.IndexedDatasetBuilder(f"{directory}/theirs.bin", getattr(np, dtype), multimodal)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{directory}/theirs.idx")
    assert read_files(directory / "ours") == read_files(directory / "theirs")
    assert read_by_them(directory / "ours", multimodal) == [document for part in parts for document in part]


def test_what_this_package_merged_is_merged_on_by_them(tmp_path: Path) -> None:
    part = write_files(tmp_path / "part", [[[1, 2], [3]], [], [[]]], "uint16")
    merge([part, part], tmp_path / "twice")
    builder = megatron.IndexedDatasetBuilder(f"{tmp_path}/thrice.bin", np.uint16)
    builder.add_index(str(tmp_path / "twice"))
    builder.add_index(str(part))
    builder.finalize(f"{tmp_path}/thrice.idx")
    assert read_by_them(tmp_path / "thrice") == [[[1, 2], [3]], [], [[]]] * 3
