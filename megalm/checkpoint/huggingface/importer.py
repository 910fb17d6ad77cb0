"""A model in Hugging Face's form to our parameters, in float32: safetensors only, whole or in shards.

The tensors are read where they are used and may lie in the page cache only: those that have to be converted go through
files in a scratch directory, mapped into memory, so that a model need not fit into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalm.checkpoint.huggingface.architectures import Architecture, from_config
from megalm.checkpoint.huggingface.exporter import INDEX, WEIGHTS
from megalm.checkpoint.huggingface.names import entries
from megalm.config.sections import Model
from megalm.errors import UserError

NO_PARAMETERS = re.compile(r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")  # buffers of early versions
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def read_config(directory: Path) -> tuple[Architecture, Model]:
    """The architecture and model section of `directory`'s config.json. Raises UserError."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory: give one that holds config.json and model.safetensors")
    return from_config(_json(directory / "config.json"), str(directory / "config.json"))


def read_weights(
    directory: Path, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], scratch: Path
) -> dict[str, Tensor]:
    """Our parameters, which have these `shapes`, from their files; see `taken_over`."""
    return taken_over(_tensors(directory), architecture, shapes, scratch, directory)


def taken_over(
    tensors: Iterator[tuple[str, Tensor]],
    architecture: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    scratch: Path,
    directory: Path,
) -> dict[str, Tensor]:
    """Our parameters, which have these `shapes`, from their names and tensors. `scratch` must last as long as what is
    returned; `directory` names them in errors.

    Raises UserError for what is missing, too many, of another shape or no float.
    """
    theirs = _named(tensors, shapes, architecture, directory)
    ours: dict[str, Tensor] = {}
    for entry in entries(shapes, architecture):
        if entry.theirs not in theirs:
            raise UserError(f"{directory}: has no tensor '{entry.theirs}', which its config asks for")
        tensor = theirs.pop(entry.theirs)
        if tensor.dtype not in FLOATS:
            raise UserError(f"{directory}: '{entry.theirs}' is {tensor.dtype}: must be float32, bfloat16 or float16")
        tensor = tensor.T if entry.transposed and tensor.ndim == 2 else tensor
        rows = [shapes[name][0] for name in entry.ours]
        if (shape := (sum(rows), *shapes[entry.ours[0]][1:])) != tuple(tensor.shape):
            raise UserError(
                f"{directory}: '{entry.theirs}' is {list(tensor.shape)}, but its config makes it {list(shape)}"
            )
        if tensor.dtype != torch.float32:
            file = str(scratch / f"{len(ours)}.bin")
            mapped = torch.from_file(file, shared=True, size=tensor.numel(), dtype=torch.float32)
            tensor = mapped.view(tensor.shape).copy_(tensor)
        ours.update(zip(entry.ours, tensor.split(rows), strict=True))
    if theirs:
        raise UserError(f"{directory}: has a tensor '{min(theirs)}', for which a {architecture.name} has no use")
    return ours


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a directory that `save_pretrained` wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def _files(directory: Path) -> list[str]:
    if (directory / INDEX).exists():
        names = _json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise UserError(f"{directory / INDEX}: its weight_map does not name files of the directory")
        return sorted(set(names.values()))
    if (directory / WEIGHTS).exists():
        return [WEIGHTS]
    hint = ""
    if pickled := sorted(path.name for path in directory.glob("pytorch_model*.bin")):
        hint = f" ({pickled[0]} is a pickle, which could run anything, and is not read)"
    raise UserError(f"{directory}: has no {WEIGHTS} and no {INDEX}{hint}: write it with `save_pretrained`")


def _tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for name in _files(directory):
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    yield key, file.get_tensor(key)
        except FileNotFoundError:
            raise UserError(f"{directory / name}: no such file, but {INDEX} names it: fetch it again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{directory / name}: damaged ({error}): fetch it again") from None


def _named(
    tensors: Iterator[tuple[str, Tensor]], shapes: Mapping[str, Any], architecture: Architecture, directory: Path
) -> dict[str, Tensor]:
    """Their tensors without those that are no parameters, and under full names: GPT-2's own files leave out a prefix,
    and some files repeat a tied head."""
    first = next(entries(shapes, architecture)).theirs.partition(".")[0]
    named = {}
    for key, tensor in tensors:
        name = key if key.startswith((f"{first}.", "lm_head.")) else f"{first}.{key}"
        tied = name == "lm_head.weight" and "head.weight" not in shapes
        if tied or NO_PARAMETERS.fullmatch(name):
            continue
        if name in named:
            raise UserError(f"{directory}: has the tensor '{key}' twice")
        named[name] = tensor
    return named
