"""The laws of a plan. One that keeps them computes each gradient once, and cannot hang.

once      each stage runs F, and B or both I and W, once for each micro-batch, on the rank that holds it
order     what an action needs is on its rank before it: its own F, I, and what another stage gave or sent
pairs     each message is sent once and received once, in the same order on both sides of a group
progress  every action is reached even if a send blocks until its receive
reduction each stage is reduced once, after its last gradient; tied weights meet after both reductions
memory    no rank's activations ever take more than the cap
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from megalm.parallel.pipeline.plan import (
    BACKWARDS,
    RECEIVES,
    SENDS,
    WEIGHTS,
    Action,
    Op,
    Placement,
    Plan,
    PlanError,
    goes_down,
    peer,
)
from megalm.parallel.pipeline.simulate import Costs, simulate


def validate(
    plan: Plan,
    placement: Placement,
    micro_batches: int,
    tied: bool = False,
    forward_only: bool = False,
    costs: Costs | None = None,
    memory_cap: float | None = None,
) -> None:
    """Raises PlanError, with the law that is broken and where. The cap is in the unit of `costs.activation`."""
    for rank, actions in enumerate(plan):
        _check_once(rank, actions, Counter(_expected(rank, placement, micro_batches, tied, forward_only)))
        _check_order(rank, actions, placement)
    _check_progress(plan, placement)
    if memory_cap is not None:
        for rank, peak in enumerate(simulate(plan, placement, costs or Costs.uniform(len(placement))).peaks):
            if peak > memory_cap:
                raise PlanError(f"rank {rank}'s activations take {peak:g}, more than the cap of {memory_cap:g}")


def _expected(rank: int, placement: Placement, micro_batches: int, tied: bool, forward_only: bool) -> Iterator[Action]:
    """What a rank has to do, with B for every backward pass."""
    last = len(placement) - 1
    for stage in (s for s, holder in enumerate(placement) if holder == rank):
        before = stage > 0 and placement[stage - 1] != rank
        after = stage < last and placement[stage + 1] != rank
        forward = [Op.FORWARD] + [Op.RECEIVE_ACTIVATION] * before + [Op.SEND_ACTIVATION] * after
        backward = [Op.BACKWARD] + [Op.SEND_GRADIENT] * before + [Op.RECEIVE_GRADIENT] * after
        for op in forward + ([] if forward_only else backward):
            yield from (Action(op, stage, i) for i in range(micro_batches))
        if not forward_only:
            yield Action(Op.REDUCE, stage)
            if tied and last > 0 and (stage == 0 or (stage == last and placement[0] != rank)):
                yield Action(Op.TIED, stage)


def _check_once(rank: int, actions: Sequence[Action], expected: Counter[Action]) -> None:
    split = {action for action in actions if action.op is Op.INPUT_GRADIENT}
    expected = Counter(expected)
    for action in split:
        expected[Action(Op.BACKWARD, action.stage, action.micro_batch)] -= 1
        expected[action] += 1
        expected[Action(Op.WEIGHT_GRADIENT, action.stage, action.micro_batch)] += 1
    found = Counter(actions)
    for action in (*expected, *found):
        if found[action] != (wanted := expected[action]):
            raise PlanError(f"rank {rank} has {action} {found[action]} times, not {wanted}")


def _check_order(rank: int, actions: Sequence[Action], placement: Placement) -> None:
    done: set[Action] = set()
    backward = {Action(Op.BACKWARD, a.stage, a.micro_batch): a for a in actions if a.op is Op.INPUT_GRADIENT}
    gradients: dict[int, list[Action]] = {}
    for action in actions:
        if action.op in WEIGHTS:
            gradients.setdefault(action.stage, []).append(action)
    for action in actions:
        if action.op is Op.REDUCE:
            needs = gradients.get(action.stage, [])
        elif action.op is Op.TIED:
            needs = [Action(Op.REDUCE, s) for s in {0, len(placement) - 1} if placement[s] == rank]
        else:
            needs = [backward.get(need, need) for need in _needs(action, placement)]
        for need in needs:
            if need not in done:
                raise PlanError(f"rank {rank} has {action} before {need}, which it needs")
        done.add(action)


def _needs(action: Action, placement: Placement) -> Iterator[Action]:
    """What must be done on the same rank before one micro-batch's action; every backward pass is named B."""
    op, stage, i = action.op, action.stage, action.micro_batch
    rank, last = placement[stage], len(placement) - 1
    if op is Op.FORWARD and stage > 0:
        near = placement[stage - 1] == rank
        yield Action(Op.FORWARD, stage - 1, i) if near else Action(Op.RECEIVE_ACTIVATION, stage, i)
    elif op in BACKWARDS:
        yield Action(Op.FORWARD, stage, i)
        if stage < last:
            near = placement[stage + 1] == rank
            yield Action(Op.BACKWARD, stage + 1, i) if near else Action(Op.RECEIVE_GRADIENT, stage, i)
    elif op is Op.WEIGHT_GRADIENT:
        yield Action(Op.INPUT_GRADIENT, stage, i)
    elif op is Op.SEND_ACTIVATION:
        yield Action(Op.FORWARD, stage, i)
    elif op is Op.SEND_GRADIENT:
        yield Action(Op.BACKWARD, stage, i)


def _check_progress(plan: Plan, placement: Placement) -> None:
    """Runs the messages alone, each send blocking until the other rank is at its receive."""
    lists = [[action for action in actions if action.op in SENDS + RECEIVES] for actions in plan]
    at = [0] * len(plan)
    active = list(range(len(plan)))
    while active:
        rank = active.pop()
        if at[rank] == len(lists[rank]):
            continue
        mine = lists[rank][at[rank]]
        other = peer(mine.op, mine.stage, placement)
        if at[other] == len(lists[other]):
            continue
        theirs = lists[other][at[other]]
        if _message(mine) == _message(theirs):
            at[rank] += 1
            at[other] += 1
            active += [rank, other]
        elif _line(mine, placement) == _line(theirs, placement) and peer(theirs.op, theirs.stage, placement) == rank:
            raise PlanError(f"rank {rank} is at {mine} when rank {other} is at {theirs}: one group, two orders")
    stuck = [f"{rank} at {lists[rank][at[rank]]}" for rank in range(len(plan)) if at[rank] < len(lists[rank])]
    if stuck:
        raise PlanError(f"ranks wait for each other for ever: rank {', rank '.join(stuck)}")


def _message(action: Action) -> tuple[bool, int, int]:
    """The same for a send and its receive."""
    is_receive = action.op in RECEIVES
    is_activation = action.op in (Op.SEND_ACTIVATION, Op.RECEIVE_ACTIVATION)
    return is_activation, action.stage - (is_receive if is_activation else -is_receive), action.micro_batch


def _line(action: Action, placement: Placement) -> bool:
    here, other = placement[action.stage], peer(action.op, action.stage, placement)
    source, target = (here, other) if action.op in SENDS else (other, here)
    return goes_down(source, target, max(placement) + 1)
