"""Whether a run may go on from a checkpoint: only if it goes on as the same run."""

from __future__ import annotations

from typing import Any

from megalm.checkpoint import Place
from megalm.config.batches import BatchPlan
from megalm.config.sections import known
from megalm.errors import UserError
from megalm.train.build import Inputs

NOT_THE_MODEL = ("model.preset:", "model.z_loss:", "model.init_std:")  # keys that do not change what a model computes


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
