"""Which layers each pipeline stage has and what its passes cost: by the operations of the model, or by the time that a
run has measured (`parallel.pipeline.costs_from`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.config.batches import plan_batches
from megalm.config.rules import split_layers
from megalm.config.sections import Config, Model, known
from megalm.config.text import read_yaml
from megalm.errors import UserError
from megalm.model.counts import pipeline_pieces
from megalm.parallel.pipeline.partition import Bounds, Piece, bounds_of, partition, stage_costs
from megalm.parallel.pipeline.plan import Placement, Schedule, in_flight, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.schedules import compute_orders
from megalm.parallel.pipeline.simulate import Costs
from megalm.parallel.pipeline.timeline import TIMELINE, Timeline, read_timeline

SHAPE = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "activation")


@dataclass(frozen=True)
class Stages:
    """All stages of a run, on whatever rank they are."""

    placement: Placement
    bounds: Bounds
    costs: Costs
    """What a rank with an equal share of the layers keeps of a micro-batch counts 1."""
    memory_cap: float | None = None
    """On what a rank keeps at once, in this unit."""

    @classmethod
    def whole(cls, layers: int) -> Stages:
        """One stage, the whole model."""
        return cls((0,), ((0, layers),), Costs.uniform(1))


def plan_stages(config: Config) -> Stages:
    """Raises UserError if the measured costs are not there or of another model, or if the schedule keeps more than
    `parallel.pipeline.memory_cap`."""
    pipeline, model = config.parallel.pipeline, config.model
    placement = placement_of(pipeline.schedule, pipeline.size, known(pipeline.chunks))
    pieces, latency = pipeline_pieces(model, config.data.sequence_length, config.run.recompute), 0.0
    if pipeline.costs_from is not None:
        timeline = read_timeline(Path(pipeline.costs_from) / TIMELINE)
        for key, (value, other) in _differing(model, timeline, Path(pipeline.costs_from)):
            raise UserError(
                f"parallel.pipeline.costs_from={pipeline.costs_from} is of a model with {key}={other}, and "
                f"model.{key}={value}: name a run of this model"
            )
        pieces, latency = timeline.pieces(), timeline.costs().latency
    share, chunks = model.num_layers / pipeline.size, placement.count(0)
    data, micro_size = config.parallel.data, known(config.batch.micro_size)
    assert isinstance(data, int), "only a resolved config may be used"
    counts = sorted({piece.size // data // micro_size for piece in plan_batches(config.batch).pieces})
    cap = None if pipeline.memory_cap is None else pipeline.memory_cap * (1 + 1e-9)  # shares do not add up exactly
    if pipeline.split:
        bounds = bounds_of(split_layers(pipeline.split))
    elif cap is None:
        bounds = partition(pieces, placement)
    else:
        bounds = _partition_under(cap * share / chunks, pipeline.schedule, pieces, placement, counts[-1])
    costs = stage_costs(pieces, bounds, latency)
    costs = replace(costs, activation=tuple(kept / share for kept in costs.activation))
    for micro_batches in counts if cap is not None else ():
        plan_schedule(pipeline.schedule, pipeline.size, chunks, micro_batches, costs, cap)
    return Stages(placement, bounds, costs, cap)


def _differing(model: Model, timeline: Timeline, run: Path) -> Iterator[tuple[str, tuple[object, object]]]:
    """Keys in which the model that was measured is of another shape than `model`, with both values."""
    measured = read_yaml(path)["model"] if (path := run / "config.yaml").exists() else {}
    for key, other in {**measured, "num_layers": sum(timeline.layers)}.items():
        if key in SHAPE and (value := getattr(model, key)) != other:
            yield key, (value, other)


def _partition_under(
    cap: float, schedule: Schedule, pieces: Sequence[Piece], placement: Placement, micro_batches: int
) -> Bounds:
    """`cap`: on what all micro-batches keep that a stage has in flight; in `auto` that may be one."""
    kept = [1] * len(placement)
    if schedule != "auto":
        kept = in_flight(compute_orders(schedule, placement, micro_batches))
    try:
        return partition(pieces, placement, [cap / most for most in kept])
    except UserError:
        if placement.count(0) == 1:
            raise
        return partition(pieces, placement)  # stages of one rank need not keep equal shares: the plan will tell
