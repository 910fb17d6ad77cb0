"""From a YAML file and overrides to the config of a run.

    YAML -> overrides -> preset under `model` -> types -> rules -> derived defaults -> Config

What comes out is complete: every derived default is filled in, lengths are in steps, `parallel.data` is a number. Only
`model.vocab_size` may still be None, as it is derived from the tokenizer. Loading `to_yaml` of a config gives an equal
config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import gcd
from pathlib import Path

from pydantic import ValidationError

from megalm.config.batches import BatchPlan, plan_batches
from megalm.config.explain import explain, one_line, show
from megalm.config.presets import PRESETS
from megalm.config.rules import batch_sizes, broken_rules, data_ranks, fewest_processes, pipeline_chunks
from megalm.config.sections import Config, Data, Model, Parallel, Schedule
from megalm.config.text import Raw, apply_overrides, merged, read_yaml
from megalm.errors import UserError, nearest

MICRO_BATCH_TOKENS = 8192
WINDOW_TOKENS = 2**24
MEGATRON_SPLIT = "969,30,1"  # the default of --split


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = 1) -> Config:
    """The config in a YAML file, with `section.key=value` overrides, for `world_size` processes.

    With `world_size` None the config is taken to run on as few processes as its `parallel` section allows.
    Raises UserError: one line that names the key, the value, the rule and the mend.
    """
    return resolve(apply_overrides(read_yaml(Path(path)), overrides), world_size)


def fitting_processes(path: str | Path, overrides: Sequence[str], devices: Callable[[Config], int]) -> int:
    """How many processes a run has when nobody says: those of its layout, and where `parallel.data` is `auto` as many
    more as `devices` there are for it and its batches allow."""
    raw = apply_overrides(read_yaml(Path(path)), overrides)
    config = resolve(raw, None)
    need = fewest_processes(config.parallel)
    if (raw.get("parallel") or {}).get("data", "auto") == "auto":
        for count in range(devices(config) // need, 1, -1):
            with suppress(UserError):
                resolve(raw, count * need)
                return count * need
    return need


def resolve(raw: Raw, world_size: int | None = 1) -> Config:
    """The config that the plain dict `raw` means; see `load_config`."""
    raw = {name: {} if section is None else section for name, section in raw.items()}  # a section may be left empty
    raw = _with_preset(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise explain(error) from None
    processes = fewest_processes(config.parallel) if world_size is None else world_size
    if messages := list(broken_rules(config, processes)):
        raise one_line(messages)
    return _derive(config, processes)


def preset_model(name: str) -> Model:
    """The `model` section that a preset alone gives."""
    return Model.model_validate({"preset": name, **PRESETS[name]})


def _with_preset(raw: Raw) -> Raw:
    section = raw.get("model")
    if not isinstance(section, dict) or not isinstance(name := section.get("preset"), str):
        return raw
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f" They are {', '.join(PRESETS)}."
        raise UserError(f"model.preset={show(name)} is not a preset.{hint}")
    return {**raw, "model": merged(PRESETS[name], section)}


def _derive(config: Config, processes: int) -> Config:
    model, length = config.model, config.data.sequence_length
    data = data_ranks(config.parallel, processes)
    schedule = _derive_schedule(config.schedule, plan_batches(config.batch), length)
    assert schedule.steps is not None
    tenth = _share(schedule.steps, 10)
    _check_stages(config, schedule.steps)
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "num_kv_heads": model.num_kv_heads or model.num_heads,
                    "head_dim": model.head_dim or model.hidden_size // model.num_heads,
                    "max_positions": model.max_positions or length,
                }
            ),
            "data": _derive_data(config.data),
            "batch": config.batch.model_copy(update={"micro_size": config.batch.micro_size or _micro(config, data)}),
            "parallel": _derive_parallel(config.parallel, data),
            "schedule": schedule,
            "checkpoint": config.checkpoint.model_copy(update={"every": config.checkpoint.every or tenth}),
            "evaluate": config.evaluate.model_copy(update={"every": config.evaluate.every or tenth}),
        }
    )


def _derive_parallel(parallel: Parallel, data: int) -> Parallel:
    pipeline, zero = parallel.pipeline, parallel.zero
    return parallel.model_copy(
        update={
            "data": data,
            "pipeline": pipeline.model_copy(update={"chunks": pipeline_chunks(pipeline)}),
            "zero": zero.model_copy(update={"shard": zero.shard or (data if zero.stage else 1)}),
        }
    )


def _derive_data(data: Data) -> Data:
    stages, sources = data.stages, data.sources
    if stages is None:
        sources = [source.model_copy(update={"weight": source.weight or 1.0}) for source in sources]
    else:
        stages = [s.model_copy(update={"name": s.name or f"stage-{number}"}) for number, s in enumerate(stages, 1)]
    window_tokens, split = data.window_tokens, data.split
    if data.order == "window":
        window_tokens = window_tokens or max(WINDOW_TOKENS, data.sequence_length)
    if data.order == "megatron":
        split = split or MEGATRON_SPLIT
    return data.model_copy(
        update={"sources": sources, "stages": stages, "window_tokens": window_tokens, "split": split}
    )


def _check_stages(config: Config, steps: int) -> None:
    """Stages must cover the run, to a batch, and each must be reached."""
    stages = config.data.stages or []
    run = plan_batches(config.batch).first_sample(steps) * config.data.sequence_length
    before = 0
    for number, stage in enumerate(stages):
        if before >= run:
            raise UserError(
                f"data.stages.{number} starts after {before:,} tokens, and the run (schedule.steps={steps}) has {run:,}"
                ": shorten the stages before it or lengthen the run"
            )
        before += stage.tokens or run
    if stages and before + config.batch.global_size * config.data.sequence_length <= run:
        raise UserError(
            f"data.stages end after {before:,} tokens, and the run (schedule.steps={steps}) has {run:,}: leave out the "
            "last stage's tokens, so that it lasts to the end, or shorten the run"
        )


def _micro(config: Config, data: int) -> int:
    share = gcd(*(size for _, size in batch_sizes(config.batch))) // data
    most = min(share, max(1, MICRO_BATCH_TOKENS // config.data.sequence_length))
    return next(size for size in range(most, 0, -1) if share % size == 0)


def _derive_schedule(schedule: Schedule, plan: BatchPlan, length: int) -> Schedule:
    """The schedule with all lengths in steps. What is derived yields to what is given."""
    steps, warmup, decay = schedule.steps, schedule.warmup_steps, schedule.decay_steps
    if schedule.tokens is not None:
        steps = plan.steps_for_tokens(schedule.tokens, length)
    assert steps is not None
    if schedule.warmup_tokens is not None:
        warmup = plan.steps_for_tokens(schedule.warmup_tokens, length)
    if schedule.decay_tokens is not None:
        decay = plan.last_steps_for_tokens(schedule.decay_tokens, length, steps)
    if warmup is None:
        warmup = max(0, min(_share(steps, 100), steps - (decay or 0)))
    if decay is None and schedule.kind == "wsd":
        decay = max(0, min(_share(steps, 5), steps - warmup))
    if warmup + (decay or 0) > steps:
        parts = [
            f"schedule.{key}={value}"
            for key in ("warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
            if (value := getattr(schedule, key)) is not None
        ]
        run = f"schedule.tokens={schedule.tokens}, {steps} steps" if schedule.tokens else f"schedule.steps={steps}"
        raise UserError(f"{' + '.join(parts)} is longer than the run ({run}): shorten the warm-up or the decay")
    return schedule.model_copy(
        update={
            "steps": steps,
            "tokens": None,
            "warmup_steps": warmup,
            "warmup_tokens": None,
            "decay_steps": decay,
            "decay_tokens": None,
        }
    )


def _share(steps: int, parts: int) -> int:
    """One part of `steps`, rounded up."""
    return -(-steps // parts)
