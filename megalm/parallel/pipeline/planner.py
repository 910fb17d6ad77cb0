"""One step's plan, from a schedule's name: ordered, lowered, and checked against every law before anything runs.

A plan is a pure function of its arguments, so that every rank that makes it makes the same. Time, with one busy core:
0.6 s for 16 ranks, 2 chunks and 256 micro-batches (55,000 actions), and in proportion to their product; the search of
`auto` adds a dozen greedy orders and `search.SIMULATED` simulated actions.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import megalm
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.parallel.pipeline.lower import lower
from megalm.parallel.pipeline.plan import Orders, Placement, Plan, Schedule, parse_action, placement_of
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
    cache: Path | None = None,
) -> Plan:
    """The plan of one step for stages placed by `placement_of(schedule, ranks, chunks)`.

    `costs` are per stage (all alike by default); `auto` makes the best of them, the other schedules have their order
    from their source. `tied`: first and last stage hold the same weights. `forward_only`: for evaluation. `memory_cap`,
    in the unit of `costs.activation`, bounds what each rank's activations take at once; raises UserError if the
    schedule takes more. `cache` is a directory where the orders that `auto` finds are kept, by a hash of its inputs.
    """
    placement = placement_of(schedule, ranks, chunks)
    costs = costs or Costs.uniform(len(placement))
    if schedule == "auto" and not forward_only:
        orders = _cached_search(placement, micro_batches, costs, memory_cap, cache)
    else:
        name = templates(placement)[0] if schedule == "auto" else schedule
        orders = compute_orders(name, placement, micro_batches, forward_only)
    if memory_cap is not None and (peak := max(simulate(orders, placement, costs).peaks)) > memory_cap:
        raise UserError(
            f"parallel.pipeline.schedule={schedule}: a rank's activations take {peak:g} at once, more than the cap of "
            f"{memory_cap:g}: choose another schedule, more recomputation or a smaller micro-batch"
        )
    plan = lower(orders, placement, costs, tied)
    validate(plan, placement, micro_batches, tied, forward_only, costs, memory_cap)
    return plan


def _cached_search(
    placement: Placement, micro_batches: int, costs: Costs, memory_cap: float | None, cache: Path | None
) -> Orders:
    if cache is None:
        return search(placement, micro_batches, costs, memory_cap)
    inputs = repr((megalm.__version__, placement, micro_batches, costs, memory_cap))
    file = cache / f"{_hash(inputs)[:16]}.txt"
    if file.exists():
        checksum, _, lines = file.read_text(errors="replace").partition("\n")
        if checksum == _hash(lines):  # else it is damaged, and made again
            return tuple(tuple(map(parse_action, line.split())) for line in lines.splitlines())
    orders = search(placement, micro_batches, costs, memory_cap)
    lines = "\n".join(" ".join(map(str, order)) for order in orders)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{_hash(lines)}\n{lines}".encode())
    return orders


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
