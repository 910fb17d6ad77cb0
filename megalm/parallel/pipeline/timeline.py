"""What a run recorded of one of its steps, and the costs that its plan really had.

timeline.json, in the run directory, is written by a run with `log.timeline: true`:

    {"schedule": "zbv", "placement": [0, 1, 1, 0], "layers": [2, 2, 2, 2], "micro_batches": 8, "bytes": 1048576,
     "ranks": [[{"action": "F0.0", "start": 0.0, "end": 0.0021}, ...], ...]}          seconds from a common zero
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from megalm.errors import UserError
from megalm.parallel.pipeline.partition import Piece
from megalm.parallel.pipeline.plan import COMPUTE, Action, Op, Placement, Schedule, parse_action
from megalm.parallel.pipeline.simulate import Costs, Timed

TIMELINE = "timeline.json"


@dataclass(frozen=True)
class Timeline:
    schedule: Schedule
    placement: Placement
    layers: tuple[int, ...]
    """Of each stage."""
    micro_batches: int
    ranks: tuple[tuple[Timed, ...], ...]
    """Each rank's compute actions, in seconds from the first one's start."""
    bytes: int
    """Sent between ranks in the step."""

    @property
    def seconds(self) -> float:
        """From the first action's start to the last one's end."""
        return max(rank[-1].end for rank in self.ranks)

    def costs(self) -> Costs:
        """Medians for each stage and operation. A whole backward counts half as input gradient, half as weight
        gradient; latency is the shortest time from a result to its use on another rank, the middle one of all edges.
        What a rank holds of one micro-batch counts 1."""
        times: dict[tuple[Op, int], list[float]] = defaultdict(list)
        when = {timed.action: timed for rank in self.ranks for timed in rank}
        for action, start, end in when.values():
            times[action.op, action.stage].append(end - start)

        def typical(op: Op, stage: int) -> float:
            return median(times[op, stage]) if (op, stage) in times else 0.0

        stages = range(len(self.placement))
        whole = [typical(Op.BACKWARD, stage) / 2 for stage in stages]
        split = [[typical(op, s) or whole[s] for s in stages] for op in (Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT)]
        waits: dict[int, list[float]] = defaultdict(list)
        for action, start, _ in when.values():
            before = when.get(Action(Op.FORWARD, action.stage - 1, action.micro_batch))
            if action.op is Op.FORWARD and before and self.placement[action.stage] != self.placement[action.stage - 1]:
                waits[action.stage].append(start - before.end)
        return Costs(
            forward=tuple(typical(Op.FORWARD, stage) for stage in stages),
            input_gradient=tuple(split[0]),
            weight_gradient=tuple(split[1]),
            activation=(1 / self.placement.count(0),) * len(stages),
            latency=max(0.0, median(map(min, waits.values()))) if waits else 0.0,
        )

    def pieces(self) -> tuple[Piece, ...]:
        """What embedding, each layer and the head took. A layer is known by the stages between the ends, or of two
        stages by the first; what the ends took longer than their layers is the embedding's and the head's."""
        costs = self.costs()

        def parts(times: tuple[float, ...]) -> tuple[float, float, float]:
            each = [time / layers for time, layers in zip(times, self.layers, strict=True)]
            layer = median(each[1:-1] or each[:1])
            first, last = (max(0.0, times[end] - self.layers[end] * layer) for end in (0, -1))
            return first, layer, last

        kinds = costs.forward, costs.input_gradient, costs.weight_gradient
        embedding, layer, head = zip(*map(parts, kinds), strict=True)
        block = replace(Piece(*layer), activation=1.0)
        return Piece(*embedding), *[block] * sum(self.layers), Piece(*head)


def read_timeline(path: Path) -> Timeline:
    """Raises UserError if the file is not one that a run has written."""
    try:
        content = json.loads(path.read_text())
        ranks = [[(parse_action(item["action"]), item["start"], item["end"]) for item in r] for r in content["ranks"]]
        begin = min(start for rank in ranks for _, start, _ in rank)
        return Timeline(
            content["schedule"],
            tuple(content["placement"]),
            tuple(map(int, content["layers"])),
            content["micro_batches"],
            tuple(tuple(Timed(a, s - begin, e - begin) for a, s, e in rank if a.op in COMPUTE) for rank in ranks),
            content["bytes"],
        )
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train with log.timeline=true, which records a step") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no timeline of a run ({error!r}): train again with log.timeline=true") from None
