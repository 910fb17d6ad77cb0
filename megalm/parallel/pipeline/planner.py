"""One step's plan, from a schedule's name: ordered, lowered, and checked against every law before anything runs.

A plan is a pure function of its arguments, so that every rank that makes it makes the same. Time, with one busy core:
0.6 s for 16 ranks, 2 chunks and 256 micro-batches (55,000 actions), and in proportion to their product; the search of
`auto` adds a dozen greedy orders and `search.SIMULATED` simulated actions.
"""

from __future__ import annotations

from megalm.errors import UserError
from megalm.parallel.pipeline.lower import lower
from megalm.parallel.pipeline.plan import Plan, Schedule, placement_of
from megalm.parallel.pipeline.schedules import compute_orders, templates
from megalm.parallel.pipeline.search import search
from megalm.parallel.pipeline.simulate import Costs, simulate
from megalm.parallel.pipeline.validate import validate


def plan_schedule(
    schedule: Schedule,
    ranks: int,
    chunks: int,
    micro_batches: int,
    costs: Costs | None = None,
    memory_cap: float | None = None,
    tied: bool = False,
    forward_only: bool = False,
) -> Plan:
    """The plan of one step for stages placed by `placement_of(schedule, ranks, chunks)`.

    `costs` are per stage (all alike by default); `auto` makes the best of them, the other schedules have their order
    from their source. `tied`: first and last stage hold the same weights. `forward_only`: for evaluation. `memory_cap`,
    in the unit of `costs.activation`, bounds what each rank's activations take at once; raises UserError if the
    schedule takes more.
    """
    placement = placement_of(schedule, ranks, chunks)
    costs = costs or Costs.uniform(len(placement))
    if schedule == "auto" and not forward_only:
        orders = search(placement, micro_batches, costs, memory_cap)
    else:
        name = templates(placement)[0] if schedule == "auto" else schedule
        orders = compute_orders(name, placement, micro_batches, forward_only)
    if memory_cap is not None and (peak := max(simulate(orders, placement, costs).peaks)) > memory_cap:
        other = "another schedule, " if ranks > 1 else ""
        raise UserError(
            f"parallel.pipeline.schedule={schedule}: a rank's activations take {peak:g} at once, more than the cap of "
            f"{memory_cap:g}: choose {other}more recomputation or a smaller micro-batch"
        )
    plan = lower(orders, placement, costs, tied)
    validate(plan, placement, micro_batches, tied, forward_only, costs, memory_cap)
    return plan
