"""From the orders of compute to a whole plan: what is sent, received, and reduced when.

The simulated step is cut into moments: an action is where it starts, a message where the action that makes it ends, on
the sender's and on the receiver's list at once. So there is one sequence of all messages that both lists agree with: a
receiver expects them in the order in which they are sent, and even sends that block until they are received never wait
in a circle, whatever the schedule.

A stage's gradients are reduced right after its last weight gradient, beside what is still to be computed. Tied weights'
gradients meet last, when the first and the last stage are both reduced.
"""

from __future__ import annotations

from megalm.parallel.pipeline.plan import BACKWARDS, WEIGHTS, Action, Op, Orders, Placement, Plan, peer
from megalm.parallel.pipeline.simulate import Costs, simulate


def lower(orders: Orders, placement: Placement, costs: Costs, tied: bool = False) -> Plan:
    """The plan of `orders`. `tied`: the first and the last stage hold the same weights, on two ranks or twice on one.

    Raises PlanError if ranks would wait for each other for ever."""
    moments: list[tuple[float, bool, int, Action]] = []
    for rank, times in enumerate(simulate(orders, placement, costs).ranks):
        for action, start, end in times:
            moments.append((start, True, rank, action))
            if (message := _message(action, placement)) is not None:
                moments.append((end, False, rank, message))
    lists: list[list[Action]] = [[] for _ in orders]
    for _, is_compute, rank, action in sorted(moments, key=lambda moment: moment[:3]):
        lists[rank].append(action)
        if not is_compute:
            step, op = (1, Op.RECEIVE_ACTIVATION) if action.op is Op.SEND_ACTIVATION else (-1, Op.RECEIVE_GRADIENT)
            receive = Action(op, action.stage + step, action.micro_batch)
            lists[peer(action.op, action.stage, placement)].append(receive)
    _reduce(lists)
    first, last = placement[0], placement[-1]
    if tied and len(placement) > 1 and any(action.op is Op.REDUCE for action in lists[first]):
        lists[first].append(Action(Op.TIED, 0))
        if last != first:
            lists[last].append(Action(Op.TIED, len(placement) - 1))
    return tuple(map(tuple, lists))


def _message(action: Action, placement: Placement) -> Action | None:
    """What is sent to another rank when `action` is done."""
    if action.op is Op.FORWARD and action.stage + 1 < len(placement):
        send = Action(Op.SEND_ACTIVATION, action.stage, action.micro_batch)
    elif action.op in BACKWARDS and action.stage > 0:
        send = Action(Op.SEND_GRADIENT, action.stage, action.micro_batch)
    else:
        return None
    return send if peer(send.op, send.stage, placement) != placement[send.stage] else None


def _reduce(lists: list[list[Action]]) -> None:
    """Adds each stage's REDUCE after the last action that adds to its weights' gradients."""
    for actions in lists:
        last = {action.stage: place for place, action in enumerate(actions) if action.op in WEIGHTS}
        for stage, place in sorted(last.items(), key=lambda item: -item[1]):
            sends = place + 1 < len(actions) and actions[place + 1].op is Op.SEND_GRADIENT  # another rank waits for it
            actions.insert(place + 1 + sends, Action(Op.REDUCE, stage))
