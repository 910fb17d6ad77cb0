"""A checkpoint's model, in one process or in several, to be looked at and not to be trained.

    find_model     what the checkpoint is of, and the layout for these processes      before any process group is made
    opened_model   the ranks agree -> process group -> empty stages -> checkpoint.load reads what each rank owns

The layout is that of the run as far as a model that is only read has one: tensor and pipeline sizes and ZeRO 3, in one
process none of them. Overrides such as `parallel.tensor=2` change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash

import megalm
from megalm.checkpoint import Place, load, read_manifest
from megalm.checkpoint.weights import model_section
from megalm.config import Config, resolve, to_yaml
from megalm.config.sections import known
from megalm.config.text import apply_overrides
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.launch.ranks import Process
from megalm.launch.world import World
from megalm.parallel.zero.sync import NoSync
from megalm.train.build import build_passes, held_by
from megalm.train.device import pick_device
from megalm.train.passes import Passes
from megalm.train.run_directory import find_checkpoint, run_of, tokenizer_of
from megalm.train.stages import plan_stages
from megalm.train.state import model_shards

T = TypeVar("T")
IMPORTED_LENGTH = 2048  # tokens of a sequence in which an imported model is evaluated, at most


@dataclass(frozen=True)
class SavedModel:
    """What is known of a checkpoint's model before it is read."""

    checkpoint: Place
    checksum: str
    """Of its manifest."""
    config: Config
    tokenizer: Tokenizer
    sources: dict[str, str]
    """Names of the run's sources by the fingerprints of their data."""
    held_out: tuple[int, int]
    """How many sequences of each source the run did not train on, and their length."""
    device: torch.device

    @property
    def positions(self) -> int:
        """The longest position that the model was made for."""
        return known(self.config.model.max_positions)


@dataclass(frozen=True)
class TrainedModel:
    """The model itself: this rank's share."""

    saved: SavedModel
    passes: Passes

    @property
    def config(self) -> Config:
        return self.saved.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.saved.tokenizer


def find_model(path: Path, process: Process | None = None, overrides: Sequence[str] = ()) -> SavedModel:
    """The checkpoint that `path`, itself or a run directory, names. Raises UserError for whatever is wrong."""
    process = process or Process()
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    state = manifest.state
    saved = state["config"] if "config" in state else _of_an_import(path, model_section(state))
    config = resolve(_to_be_read(saved, overrides, process.size), process.size)
    if config.parallel.sequence_sharding:
        raise UserError("parallel.sequence_sharding=true: texts of any length are not shared by rows: leave it out")
    tokenizer = tokenizer_of(run_of(path, checkpoint), checkpoint, state)
    if tokenizer is None:
        raise UserError(f"{path}: was imported without a tokenizer: import a directory that has tokenizer.json")
    sources = {fingerprint: name for name, fingerprint in state.get("sources", {}).items()}
    held_out = saved["data"]["validation"]["samples"], saved["data"]["sequence_length"]
    device = pick_device(config.run.device, process.local_rank)
    return SavedModel(checkpoint, manifest.checksum, config, tokenizer, sources, held_out, device)


def load_model(saved: SavedModel) -> TrainedModel:
    """On all ranks of the default process group; a layout of one process needs none."""
    passes = build_passes(saved.config, saved.device, plan_stages(saved.config))
    load(saved.checkpoint, model_shards(held_by(passes)), prefix="model.", group=passes.mesh.world.group)
    for number, stage in passes.stages.items():
        if isinstance(passes.syncs[number], NoSync):  # else FSDP casts what it gathers
            for parameter in stage.parameters():
                if parameter.ndim == 2:  # as each layer would in each pass: the same bits, at half of the memory
                    parameter.data = parameter.to(stage.compute)
    return TrainedModel(saved, passes)


@contextmanager
def opened_model(
    path: Path, process: Process, overrides: Sequence[str], prepare: Callable[[SavedModel], T]
) -> Iterator[tuple[TrainedModel, T]]:
    """The model on all ranks of a run of `process`, and what `prepare` makes of its description, which raises a
    UserError for mistakes and must make the same on all ranks: what it makes is compared as text."""

    def found() -> tuple[SavedModel, T]:
        saved = find_model(path, process, overrides)
        return saved, prepare(saved)

    world = World(process)
    saved, prepared = world.agree(found, _facts, lambda it: it[0].config.run.timeout)
    with world.joined(saved.device, saved.config.run.timeout):
        yield load_model(saved), prepared


def _of_an_import(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """A resolved config around the model section of what has no run: of its other sections only defaults are used."""
    raw = {
        "run": {"dir": str(path)},
        "model": model,
        "tokenizer": {"path": str(path)},
        "data": {
            "sources": [{"name": "none", "path": str(path)}],
            "sequence_length": min(model["max_positions"], IMPORTED_LENGTH),
        },
        "batch": {"global_size": 1, "micro_size": 1},
        "schedule": {"steps": 1},
    }
    return resolve(raw).model_dump(mode="json")


def _to_be_read(config: dict[str, Any], overrides: Sequence[str], processes: int) -> dict[str, Any]:
    """A run's resolved config for reading its model in so many processes."""
    parallel, micro_size = config["parallel"], config["batch"]["micro_size"]
    layout = {
        "tensor": parallel["tensor"],
        "pipeline": {"size": parallel["pipeline"]["size"]},
        "zero": {"stage": parallel["zero"]["stage"]},
    }
    whole_rows = {"sequence_sharding": False}  # documents may be of any length
    raw = {
        **config,
        "run": {**config["run"], "device": "auto", "compile": False, "recompute": "none"},
        "batch": {"global_size": micro_size * processes, "micro_size": micro_size},
        "parallel": {**layout, **whole_rows} if processes > 1 else whole_rows,
        "deepspeed": {},
    }
    return apply_overrides(raw, overrides)


def _facts(found: tuple[SavedModel, object]) -> dict[str, str]:
    """What must be the same on all ranks."""
    saved, prepared = found
    return {
        "config": to_yaml(saved.config),
        "checkpoint": f"{saved.checkpoint} {saved.checksum}",
        "tokenizer": saved.tokenizer.fingerprint,
        "question": xxhash.xxh3_128_hexdigest(repr(prepared).encode(errors="surrogatepass")),
        "kind of device": saved.device.type,
        "version of megalm": megalm.__version__,
        "version of torch": torch.__version__,
    }
