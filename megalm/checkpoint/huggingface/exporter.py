"""A checkpoint to safetensors shards that transformers loads, in the memory of one shard.

    parameters, one at a time --> mean, padding off, renamed, joined, rounded --> model-00001-of-00003.safetensors
                                                                                  model.safetensors.index.json

Sizes are known beforehand, so the shards are cut before anything is read (as `transformers` does: a new one where the
next tensor would pass the limit).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalm.checkpoint.huggingface.architectures import architecture_of
from megalm.checkpoint.huggingface.names import VOCABULARY, Entry, entries
from megalm.checkpoint.weights import Weights
from megalm.files import replacing, write_atomic

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def export_weights(
    weights: Weights,
    directory: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    vocab_size: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes the tensors to `directory`; rows of the vocabulary after `vocab_size`, which stand for no token, are left
    out. Returns their bytes. `on_progress` is told bytes done and bytes in all."""

    def size(entry: Entry) -> int:
        return dtype.itemsize * sum(prod(_shape(weights, name, vocab_size)) for name in entry.ours)

    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries(weights.shapes, architecture_of(weights.model)):
        if shards[-1] and size(entry) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= size(entry)
    total = sum(size(entry) for shard in shards for entry in shard)
    place, done = {}, 0
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in shard:
            tensors[entry.theirs] = joined(weights, entry, dtype, vocab_size)
            place[entry.theirs] = name
            done += size(entry)
            on_progress(done, total)
        with replacing(directory / name) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # the library's own is for the owner's eyes only
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        write_atomic(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return total


def _shape(weights: Weights, name: str, vocab_size: int) -> tuple[int, ...]:
    shape = weights.shapes[name]
    return (min(shape[0], vocab_size), *shape[1:]) if name in VOCABULARY else shape


def joined(weights: Weights, entry: Entry, dtype: torch.dtype, vocab_size: int) -> Tensor:
    """The tensor of theirs, without rows of the vocabulary after `vocab_size`."""
    parts = (weights.tensor(name)[: _shape(weights, name, vocab_size)[0]].to(dtype) for name in entry.ours)
    tensor = torch.cat(list(parts)) if len(entry.ours) > 1 else next(parts)
    return (tensor.T if entry.transposed and tensor.ndim == 2 else tensor).contiguous()
