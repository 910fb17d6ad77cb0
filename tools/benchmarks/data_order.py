"""The sample order against megatron-core's: start-up, blend look-up, and what window mode costs.

    start-up    1,000 sources of 15 billion tokens each, as sparse files: open, build the order, locate a first batch;
                seconds, memory beyond the imports, files written
    blend       1,000 sources: ours looked up batch by batch, theirs built sample by sample
    window      packing and locating one whole window of a source of random documents

Figures are CPU seconds (user + system). Run it on an idle machine, in an environment with megatron-core.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np

from megalm.data.dataset import Source
from megalm.data.loader import Loader
from megalm.data.order import Blend
from megalm.data.order.window import Window

SOURCES, TOKENS, DOCUMENT, LENGTH = 1000, 15 * 10**9, 1000, 4096
BATCH = 1024


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_sparse(directory: Path, tokens: int) -> None:
    """A prepared source of documents of equal length whose files take up no room."""
    directory.mkdir()
    documents = tokens // DOCUMENT
    with (directory / "shard-00000.bin").open("wb") as file:
        file.truncate(2 * tokens)
    with (directory / "shard-00000.idx").open("wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1))
        file.truncate(34 + 12 * documents + 8 * (documents + 1))
        file.seek(34 + 4 * (documents - 1))
        file.write(struct.pack("<i", DOCUMENT))
        file.seek(34 + 4 * documents + 8 * (documents - 1))
        file.write(struct.pack("<q", 2 * (tokens - DOCUMENT)))
        file.seek(34 + 12 * documents + 8 * documents)
        file.write(struct.pack("<q", documents))
    totals = {"documents": documents, "tokens": tokens, "text_bytes": 4 * tokens}
    shard = {"name": "shard-00000", **totals, "bin_checksum": "0" * 32, "idx_checksum": "0" * 32}
    tokenizer = {"path": "bpe", "kind": "bpe", "fingerprint": "f00d", "vocab_size": 50257, "eod": 0}
    content = {"format": "megalm-data", "version": 1, "tokenizer": tokenizer, "dtype": "uint16", "skipped": {}}
    (directory / "manifest.json").write_text(json.dumps({**content, "shards": [shard], **totals}))


def weights() -> list[float]:
    return np.random.default_rng(0).dirichlet([0.5] * SOURCES).clip(1e-5).tolist()


def start_up() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for number in range(SOURCES):
            write_sparse(root / f"{number:04}", TOKENS)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        seconds, memory = cpu_seconds(), peak_bytes()
        sources = [Source(f"s{number}", root / f"{number:04}", "f00d") for number in range(SOURCES)]
        loader = Loader(sources, weights(), LENGTH, 1, 0, True, 64)
        loader.order.pieces(10**9, BATCH)
        seconds, memory = cpu_seconds() - seconds, peak_bytes() - memory
        written = {path: path.stat().st_mtime_ns for path in root.rglob("*")} != before
    total = SOURCES * TOKENS / 1e12
    print(
        f"start-up of {total:.0f}T tokens in {SOURCES:,} sources: {seconds:.2f} s, {memory / 2**20:.0f} MiB", end=", "
    )
    print("files were written" if written else "no file written")


def blend(samples: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.helpers import build_blending_indices

    ours = theirs = float("inf")
    shares = np.array(weights()) / sum(weights())
    for _ in range(3):
        start, mixture = cpu_seconds(), Blend(shares.tolist())
        building = cpu_seconds() - start
        start = cpu_seconds()
        for first in range(0, 20 * samples, BATCH):
            mixture.locate(np.arange(first, first + BATCH))
        ours = min(ours, (cpu_seconds() - start) / (20 * samples))
        source, rank = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        start = cpu_seconds()
        build_blending_indices(source, rank, shares, SOURCES, samples, False)
        theirs = min(theirs, (cpu_seconds() - start) / samples)
    held = mixture.nbytes
    print(f"blend of {SOURCES:,} sources: ours {ours * 1e9:.1f} ns a sample, {held / 1e6:.1f} MB in all ", end="")
    print(
        f"({building:.2f} s to build); megatron-core {theirs * 1e9:.0f} ns and 10 bytes a sample: {theirs / ours:.0f}x"
    )


class Documents:
    """Documents of log-normal lengths."""

    def __init__(self, tokens: int) -> None:
        lengths = np.random.default_rng(0).lognormal(6.0, 1.2, tokens // 400).astype(np.int64) + 1
        self._starts = np.cumsum(lengths) - lengths
        assert self._starts[-1] > tokens

    def document_starts(self, first: int, end: int) -> np.ndarray:
        return self._starts[slice(*np.searchsorted(self._starts, [first, end]))]


def window() -> None:
    tokens = 2**24 * 4
    order = Window(["text"], [Documents(tokens)], [tokens], LENGTH, 2**24, 1)
    samples = int(order.epoch_samples[0])
    start = cpu_seconds()
    padding = 0
    for first in range(0, samples, BATCH):
        pieces = order.pieces(np.zeros(BATCH, np.int64), np.arange(first, first + BATCH))
        padding += int(pieces.length_P[pieces.source_P < 0].sum())
    seconds = cpu_seconds() - start
    share = padding / (samples * (LENGTH + 1))
    print(f"window mode, packing included: {seconds / samples * 1e6:.1f} us a sample of {LENGTH}, {share:.3%} padding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500_000, help="samples that megatron-core blends")
    start_up()
    window()
    blend(parser.parse_args().samples)


if __name__ == "__main__":
    main()
