"""Reading training samples, and merging shards, against megatron-core: the same files, in turn.

Samples: our loader's micro-batches (tokens, labels, loss mask, positions that start anew with each document, document
ends), from the whole loader and from given places without it, against GPTDataset with position reset and loss mask but
no attention mask, its fastest setting, which gives no document ends. All in shuffled order, files in the page cache,
samples per CPU-second (user and system, all threads) of one process; what is there before the first sample (their
index, our manifest) is not counted.

Merge: documents of one token, so that the index and not the copying of tokens is what takes the time; nanoseconds of
CPU and bytes of memory a document, each in a process of its own.

Needs megatron-core: `pip install --no-deps megatron-core`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megalm._indexed_dataset import BatchMemory, Writer, merge
from megalm.data.dataset import Source, gather_pieces
from megalm.data.loader import Loader, assemble
from megalm.data.manifest import Manifest, Shard, TokenizerRecord

with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
    warnings.simplefilter("ignore")  # of what it lacks on a machine without a GPU
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

LENGTH, VOCAB, EOD = 4096, 50257, 50256
MICRO, GLOBAL = 8, 256
PREFIX = "shard-00000"


def write_data(directory: Path, tokens: int, mean: int) -> None:
    """A prepared directory: one shard of documents of log-normal lengths, as web text has."""
    random = np.random.default_rng(0)
    lengths = np.maximum(random.lognormal(np.log(mean) - 0.5, 1.0, tokens // mean), 2).astype(np.int64)
    ids = random.integers(0, EOD, lengths.sum(), np.int32)
    ids[np.cumsum(lengths) - 1] = EOD
    with Writer(directory / PREFIX, "uint16") as writer:
        writer.append(ids, lengths)
    shard = Shard(PREFIX, writer.documents, writer.tokens, 0, "", "")
    Manifest(TokenizerRecord("none", "bpe", "", VOCAB, EOD), "uint16", {}, (shard,)).save(directory)


def our_loader(directory: Path) -> Callable[[int], int]:
    loader = Loader(
        [Source("web", directory, "")],
        [1.0],
        sequence_length=LENGTH,
        seed=0,
        eod=EOD,
        document_attention=True,
        validation_samples=0,
    )

    def read(count: int) -> int:
        steps = [[MICRO] * (GLOBAL // MICRO)] * (count // GLOBAL)
        return sum(len(batch.sources_B) for step in loader.stream(0, steps) for batch in step.parts)

    return read


def our_reading(directory: Path) -> Callable[[int], int]:
    source, memory = Source("web", directory, ""), BatchMemory()
    same_B = np.zeros(MICRO, np.int64)

    def read(count: int) -> int:
        start_B = np.random.default_rng(0).integers(0, source.tokens - LENGTH, count)
        done = 0
        for first in range(0, count, MICRO):
            tokens_BS1 = memory.empty((MICRO, LENGTH + 1))
            places = (same_B, start_B[first : first + MICRO], same_B + LENGTH + 1)
            gather_pieces([source], *places, EOD, tokens_BS1.reshape(-1))
            done += len(assemble(tokens_BS1, same_B, EOD, True, memory).sources_B)
        return done

    return read


def their_samples(directory: Path, count: int) -> Callable[[int], int]:
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        path_to_cache=str(directory / "cache"),
        tokenizer=SimpleNamespace(vocab_size=VOCAB, eod=EOD, pad=-1, unique_identifiers={}),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    low = IndexedDataset(str(directory / PREFIX), mmap=True)
    documents = np.arange(len(low), dtype=np.int32)
    dataset = GPTDataset(low, str(directory / PREFIX), documents, count, Split.train, config)

    def read(count: int) -> int:
        return sum(len(dataset[i]["tokens"]) == LENGTH for i in range(count))

    return read


def compare_samples(tokens: int, mean: int, count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_data(directory, tokens, mean)
        readers = {
            "megatron-core GPTDataset": their_samples(directory, count),
            "megalm, the whole loader": our_loader(directory),
            "megalm, from given places": our_reading(directory),
        }
        best = dict.fromkeys(readers, 0.0)
        for _ in range(rounds):
            for name, read in readers.items():
                start = time.process_time()
                done = read(count)
                best[name] = max(best[name], done / (time.process_time() - start))
    print(f"samples of {LENGTH} tokens, documents of {mean} tokens on average, best of {rounds} rounds of {count}:")
    show(best, "samples per CPU-second", larger=True)


def our_merge(parts: list[Path], output: Path) -> None:
    merge(parts, output)


def their_merge(parts: list[Path], output: Path) -> None:
    builder = IndexedDatasetBuilder(f"{output}.bin", np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(f"{output}.idx")


def in_child(task: Callable[[], None]) -> tuple[float, int]:
    """CPU seconds of `task`, and by how many bytes the memory of a process of its own grew at most."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        gc.freeze()
        held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        start = time.process_time()
        task()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(writing, f"{time.process_time() - start} {max(0, peak - held)}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        seconds, grown = file.read().split()
    os.waitpid(child, 0)
    return float(seconds), int(grown)


def compare_merges(documents: int, rounds: int) -> None:
    tasks = {"megatron-core add_index": their_merge, "megalm": our_merge}
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for number in range(4):
            parts.append(Path(folder) / f"part{number}")
            with Writer(parts[-1], "uint16") as writer:
                writer.append(np.ones(documents // 4, np.int32), np.ones(documents // 4, np.int64))
        nanoseconds = dict.fromkeys(tasks, float("inf"))
        grown = dict.fromkeys(tasks, 0.0)
        for _ in range(rounds):
            for name, task in tasks.items():
                seconds, size = in_child(lambda task=task: task(parts, Path(folder) / "whole"))  # type: ignore[misc]
                nanoseconds[name] = min(nanoseconds[name], 1e9 * seconds / documents)
                grown[name] = max(grown[name], size / documents)
    print(f"merge of 4 shards, {documents} documents of one token, best of {rounds} rounds:")
    show(nanoseconds, "ns of CPU a document", larger=False)
    show(grown, "bytes of memory a document", larger=False)


def show(figures: dict[str, float], unit: str, larger: bool) -> None:
    """Prints each figure; the first is theirs, which the others are compared with."""
    theirs = next(iter(figures.values()))
    for name, value in figures.items():
        ratio = value / theirs if larger else theirs / max(value, 1e-9)
        print(f"  {name:26} {value:12,.1f} {unit:28} {ratio:6.1f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of the data")
    parser.add_argument("--mean", type=int, default=700, help="tokens of a document, on average")
    parser.add_argument("--samples", type=int, default=4096, help="samples read in a round")
    parser.add_argument("--documents", type=int, default=2_000_000, help="documents merged")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    compare_samples(arguments.tokens, arguments.mean, arguments.samples // GLOBAL * GLOBAL, arguments.rounds)
    compare_merges(arguments.documents, arguments.rounds)
    print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
