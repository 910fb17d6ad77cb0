"""Whether a run may go on from a checkpoint: only if it goes on as the same run. And what a new one may begin with: the
weights of any checkpoint of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.checkpoint import Place, read_manifest
from megalm.checkpoint.places import names
from megalm.checkpoint.weights import model_section
from megalm.config.batches import BatchPlan
from megalm.config.sections import known
from megalm.errors import UserError
from megalm.train.build import Inputs
from megalm.train.run_directory import checkpoints_of, find_checkpoint

NOT_THE_MODEL = ("model.preset:", "model.z_loss:", "model.init_std:")  # keys that do not change what a model computes
OF_TRAINING = tuple(f"model.{key}:" for key in ("attention", "dropout", "document_attention", "label_smoothing"))


def refuse_another_run(found: Place, saved: dict[str, Any], inputs: Inputs, batches: BatchPlan) -> None:
    """A run goes on only with the same model on the same data in the same order and the same batches."""
    changes = differences(saved["config"], inputs.config.model_dump(mode="json"))
    if saved["data"] != inputs.loader.fingerprint:
        sources = _changed_sources(saved["sources"], inputs.loader.source_fingerprints)
        what = "; ".join(", ".join(part) for part in (sources, changes) if part)
        raise UserError(
            f"{found}: was trained on other data or in another order ({what or 'by another version of megalm'}): "
            "continue with the same data section and run.seed, or choose another run.dir"
        )
    model = [change for change in changes if change.startswith("model.") and not change.startswith(NOT_THE_MODEL)]
    if model:
        raise UserError(
            f"{found}: is of another model ({', '.join(model)}): continue with the same model section, or choose "
            "another run.dir"
        )
    consumed = saved["position"]["consumed_samples"]
    steps, done = known(inputs.config.schedule.steps), saved["position"]["step"]
    if done > steps:
        raise UserError(
            f"schedule.steps={steps} is less than the {done} steps that {found} has: raise it, or "
            "choose another run.dir"
        )
    if batches.first_sample(done) != consumed:
        raise UserError(
            f"{found}: {consumed} sequences in {done} steps do not fit this config's "
            f"batches ({', '.join(changes)}): continue with the same batch.global_size and batch.ramp, or choose "
            "another run.dir"
        )


def initial_checkpoint(inputs: Inputs) -> Place | None:
    """What `run.init_from` names, if the run has no checkpoint of its own. Raises UserError unless it is of the same
    model; sequences may be longer than they were, where positions are no parameters."""
    config = inputs.config
    path, own = config.run.init_from, checkpoints_of(config, Path(config.run.dir))
    if path is None or any(name.startswith("step-") for name in names(own)):
        return None
    if Path(path, "config.json").exists():
        raise UserError(f"run.init_from={path}: is in Hugging Face's form: name what `megalm import` makes of it")
    try:
        found = find_checkpoint(Path(path))
        state = read_manifest(found).state
    except UserError as error:
        raise UserError(f"run.init_from={error}") from None
    may_differ = NOT_THE_MODEL + OF_TRAINING + (("model.max_positions:",) if config.model.position == "rope" else ())
    changes = differences({"model": model_section(state)}, config.model_dump(mode="json"))
    model = [change for change in changes if change.startswith("model.") and not change.startswith(may_differ)]
    if model:
        raise UserError(
            f"run.init_from={path}: is of another model ({', '.join(model)}): give the model section what it has "
            "there, or leave run.init_from out"
        )
    return found


def _changed_sources(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """The sources whose data is not what it was."""
    changed = [f"source '{name}' holds other data" for name in now if name in saved and saved[name] != now[name]]
    gone = [f"source '{name}' is left out" for name in saved if name not in now]
    new = [f"source '{name}' is new" for name in now if name not in saved]
    return [*changed, *gone, *new]


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`section.key: old -> new` of everything in which two configs differ."""
    old, new = _flat(saved), _flat(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
