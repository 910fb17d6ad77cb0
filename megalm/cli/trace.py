"""`megalm data trace`: which samples a run has seen, computed again from its config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.config import ConfigFile, Overrides


def trace(
    config: ConfigFile,
    step: Annotated[int, typer.Option(min=0, help="After how many steps.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Compute the hash of all samples up to a step, and compare it with what the run recorded."""
    from megalm.cli import show
    from megalm.config import load_config
    from megalm.config.batches import plan_batches
    from megalm.data.open import open_run_data
    from megalm.data.trace import hash_of
    from megalm.errors import UserError

    resolved = load_config(config, overrides or (), world_size=None)
    steps = resolved.schedule.steps or 0
    if step > steps:
        raise UserError(f"--step={step} is after the run's last (schedule.steps={steps}): choose an earlier one")
    loader = open_run_data(resolved).loader
    samples = plan_batches(resolved.batch).first_sample(step)
    data_hash = hash_of(loader, samples)
    drawn = loader.order.mixture.drawn(samples).tolist()
    length = resolved.data.sequence_length
    metrics = Path(resolved.run.dir) / "metrics.jsonl"
    recorded = _recorded(metrics, step)
    rows = [
        ("samples", show.number(samples)),
        ("tokens", show.number(samples * length)),
        *((f"tokens of {name}", show.number(n * length)) for name, n in zip(loader.source_names, drawn, strict=True)),
        ("data hash", data_hash),
        ("recorded", recorded or "not yet"),
    ]
    show.table(f"Samples up to step {step}", rows)
    if recorded not in (None, data_hash):
        raise UserError(
            f"{metrics}: step {step} saw other samples than this config gives: the config or the data has changed since"
        )


def _recorded(metrics: Path, step: int) -> str | None:
    """The hash that a run wrote for a step, if it has."""
    import orjson

    if not metrics.exists():
        return None
    with metrics.open("rb") as lines:
        for line in lines:
            try:
                values = orjson.loads(line)
            except orjson.JSONDecodeError:  # half a line, written by a run that was killed
                continue
            if values.get("step") == step and "data_hash" in values:
                return str(values["data_hash"])
    return None
