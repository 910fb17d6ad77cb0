"""Which data has a run seen? A rolling hash over all samples that were delivered, in their order.

    hash before the first sample = xxh3-128(fingerprint of the loader)
    hash after a sample          = xxh3-128(hash before it, number of its source, its rank in the source)

The fingerprint names the sources' contents and all that decides the order, so source and rank say which tokens a sample
was. The hash does not depend on batch sizes, ranks or workers; equal hashes mean the same samples in the same order. It
is in every checkpoint and every step's line of `metrics.jsonl`; `megalm data trace` computes it again.
"""

from __future__ import annotations

import numpy as np
import xxhash

from megalm.data.loader import Loader

PORTION = 1 << 16  # samples that are located at once


def first_hash(fingerprint: str) -> str:
    """The hash before the first sample, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(fingerprint.encode())


def rolled(data_hash: str, source_B: np.ndarray, rank_B: np.ndarray) -> str:
    """The hash after these samples, of which source and rank are hashed as little-endian 64-bit numbers."""
    digest = bytes.fromhex(data_hash)
    samples = np.stack([source_B, rank_B], axis=1).astype("<i8").tobytes()
    for i in range(0, len(samples), 16):
        digest = xxhash.xxh3_128_digest(digest + samples[i : i + 16])
    return digest.hex()


def hash_of(loader: Loader, samples: int) -> str:
    """The hash after the first `samples` of a run."""
    data_hash = first_hash(loader.fingerprint)
    for first in range(0, samples, PORTION):
        data_hash = rolled(data_hash, *loader.order.locate(first, min(PORTION, samples - first)))
    return data_hash
