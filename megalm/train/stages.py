"""Which layers each pipeline stage has and what its passes cost: by the operations of the model, or by the time that a
run has measured (`parallel.pipeline.costs_from`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megalm.config.batches import plan_batches
from megalm.config.rules import split_layers
from megalm.config.sections import Config, known
from megalm.errors import UserError
from megalm.model.counts import pipeline_pieces
from megalm.parallel.pipeline.partition import Bounds, bounds_of, partition, stage_costs
from megalm.parallel.pipeline.plan import Placement, placement_of
from megalm.parallel.pipeline.planner import plan_schedule
from megalm.parallel.pipeline.simulate import Costs
from megalm.parallel.pipeline.timeline import TIMELINE, read_timeline


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
        if (layers := sum(timeline.layers)) != model.num_layers:
            raise UserError(
                f"parallel.pipeline.costs_from={pipeline.costs_from} is of a model with {layers} layers, and "
                f"model.num_layers={model.num_layers}: name a run of this model"
            )
        pieces, latency = timeline.pieces(), timeline.costs().latency
    bounds = bounds_of(split_layers(pipeline.split)) if pipeline.split else partition(pieces, placement)
    costs = stage_costs(pieces, bounds, latency)
    share = model.num_layers / pipeline.size
    costs = replace(costs, activation=tuple(kept / share for kept in costs.activation))
    if pipeline.memory_cap is None:
        return Stages(placement, bounds, costs)
    cap = pipeline.memory_cap * (1 + 1e-9)  # such shares do not add up exactly
    data, micro_size = config.parallel.data, known(config.batch.micro_size)
    assert isinstance(data, int), "only a resolved config may be used"
    for size in sorted({piece.size for piece in plan_batches(config.batch).pieces}):
        micro_batches = size // data // micro_size
        plan_schedule(pipeline.schedule, pipeline.size, known(pipeline.chunks), micro_batches, costs, cap)
    return Stages(placement, bounds, costs, cap)
