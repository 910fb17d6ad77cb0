"""Runs one rank's part of a plan, whatever the schedule. It knows nothing of models or data: `forward` does a stage's
forward pass on a micro-batch, and a stage's `GradientSync` what data parallelism asks for.

    F       input -> forward -> output           the output is sent on and forgotten: only its place in autograd's
    B       output's gradient -> input's         graph is kept
    I W     the same in two halves               what W computes waits in the queue that the layers are given
    >F >B   sends, without waiting
    <F <B   posts a receive, if it is not posted yet; who needs the message waits for it

An activation is alive from its F until its B or W, with the input that was received for it. One stage is the plan for
no pipeline, and the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.parallel.mesh import Mesh
from megalm.parallel.pipeline.p2p import Buffers, Inbox, Outbox, Shape
from megalm.parallel.pipeline.plan import BACKWARDS, COMPUTE, RECEIVES, SENDS, WEIGHTS, Action, Op, Placement, peer
from megalm.parallel.pipeline.recording import Recording
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.parallel.zero.sync import GradientSync

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(stage, micro-batch, output of the stage before) -> output; of the last stage the scalar to differentiate."""
Key = tuple[int, int]
"""Stage and micro-batch."""


@dataclass(slots=True)
class _Task:
    """An action with all that can be known of it before a step."""

    action: Action
    run: Callable[[_Task, Tensor | None], None]
    key: Key
    last: bool = False
    """Of a B or W: it completes the stage's gradients. Of an I: it is the stage's last."""
    inbox: Inbox | None = None
    """Of a receive, and of the action that needs what is received: where it comes from, as message `number`."""
    number: int = 0
    takes: bool = False
    splits: bool = False
    """Of F, B and I: whether the micro-batch's backward pass is split."""
    outbox: Outbox | None = None
    prepares: Key | None = None
    """The weight gradients that are next."""


class Executor:
    """One rank's `actions` of a plan, to be run step after step with `step`.

    `syncs` has the data parallelism of each stage on this rank, `queue` is that of the stages' layers, `dtype` that of
    the stages' outputs, and `buffers` where what is received lies: one for all executors whose steps do not overlap.
    `add_tied` is called when the first and the last stage, as far as they are here, are reduced.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        syncs: Mapping[int, GradientSync],
        placement: Placement = (0,),
        mesh: Mesh | None = None,
        queue: WeightGradientQueue | None = None,
        dtype: torch.dtype = torch.float32,
        add_tied: Callable[[], None] | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.mesh, self.placement = mesh or Mesh(), placement
        self.queue, self.add_tied = queue or WeightGradientQueue(), add_tied
        self.trains = any(action.op in WEIGHTS for action in actions)
        self.syncs = dict(syncs)
        self.buffers = buffers or Buffers(dtype, self.mesh.device)
        self.peak = 0
        """The most activations, each of one stage and micro-batch, that were alive at once in the last step."""
        self._inboxes: dict[int, Inbox] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._tasks = self._prepare(actions)

    def step(self, forward: Forward, shapes: Sequence[Shape] = (), recording: Recording | None = None) -> None:
        """Runs all actions; after it the gradients of the parameters are complete over the data ranks.

        `shapes`: of what is sent between stages, for each micro-batch. Raises a RuntimeError that names the other rank
        if a message cannot be sent or received within the groups' time limit.
        """
        self._begin(forward, shapes)
        self.queue.pool = []
        with torch.set_grad_enabled(self.trains):
            for task in self._tasks:
                if task.prepares is not None:
                    self.queue.prepare(task.prepares)
                if recording is None:
                    task.run(task, task.inbox.take(task.number) if task.takes and task.inbox is not None else None)
                else:
                    self._run_timed(task, recording)
        assert not self.queue.pool, "a weight gradient was left behind"
        self.queue.pool = None
        for sync in self._unfinished.values():
            sync.finish()
        for outbox in self._outboxes.values():
            outbox.finish()
        del self._call  # and with it the step's data
        if recording is not None:
            recording.bytes = sum(self._bytes(task) for task in self._tasks if task.outbox is not None)

    def _begin(self, forward: Forward, shapes: Sequence[Shape]) -> None:
        self._call, self._shapes = forward, shapes
        self._inputs: dict[Key, Tensor] = {}
        self._outputs: dict[Key, GradientEdge | Tensor] = {}
        self._activations: dict[Key, Tensor] = {}  # by the stage that made them, until they are handed on
        self._gradients: dict[Key, Tensor] = {}
        self._received: dict[Key, list[Tensor]] = {}
        self._alive = self.peak = 0
        self._unfinished = dict(self.syncs)
        self.buffers.begin(shapes)
        for inbox in self._inboxes.values():
            inbox.begin(shapes)
        for sync in self.syncs.values():
            sync.begin()

    def _run_timed(self, task: _Task, recording: Recording) -> None:
        """The time of a receive is that of waiting for it."""
        received = None
        if task.takes and task.inbox is not None:
            op = Op.RECEIVE_ACTIVATION if task.action.op is Op.FORWARD else Op.RECEIVE_GRADIENT
            with recording.span(Action(op, *task.key)):
                received = task.inbox.take(task.number)
        if task.action.op in RECEIVES:
            task.run(task, None)
        else:
            with recording.span(task.action):
                task.run(task, received)

    def _bytes(self, task: _Task) -> int:
        return math.prod(self._shapes[task.action.micro_batch]) * self.buffers.dtype.itemsize

    # Before a step

    def _prepare(self, actions: Sequence[Action]) -> list[_Task]:
        runs = {
            Op.FORWARD: self._run_forward,
            Op.BACKWARD: self._run_backward,
            Op.INPUT_GRADIENT: self._run_input_gradient,
            Op.WEIGHT_GRADIENT: self._run_weight_gradient,
            Op.SEND_ACTIVATION: self._send_activation,
            Op.SEND_GRADIENT: self._send_gradient,
            Op.RECEIVE_ACTIVATION: self._post,
            Op.RECEIVE_GRADIENT: self._post,
            Op.REDUCE: self._reduce,
            Op.TIED: self._tied,
        }
        messages: dict[tuple[bool, Key], _Task] = {}
        tasks = []
        for action in actions:
            op, key = action.op, (action.stage, action.micro_batch)
            task = _Task(action, runs[op], key)
            if op in RECEIVES:
                source = peer(op, action.stage, self.placement)
                task.inbox = self._inboxes.get(source) or Inbox(self.mesh, source, self.buffers)
                self._inboxes[source], task.number = task.inbox, task.inbox.expect(action.micro_batch)
                messages[op is Op.RECEIVE_ACTIVATION, key] = task
            elif op in SENDS:
                target = peer(op, action.stage, self.placement)
                task.outbox = self._outboxes.get(target) or Outbox(self.mesh, target, 2 * len(self.placement))
                self._outboxes[target] = task.outbox
            elif op is not Op.WEIGHT_GRADIENT and (receive := messages.get((op is Op.FORWARD, key))) is not None:
                task.inbox, task.number, task.takes = receive.inbox, receive.number, True
            tasks.append(task)
        _mark(tasks)
        return tasks

    # Actions

    def _run_forward(self, task: _Task, received: Tensor | None) -> None:
        stage, micro_batch = key = task.key
        x = self._activations.pop((stage - 1, micro_batch)) if received is None and stage > 0 else received
        if x is not None and self.trains:
            x = self._inputs[key] = x.detach().requires_grad_()
        self.queue.splits = task.splits
        y = self._call(stage, micro_batch, x)
        if stage + 1 < len(self.placement):
            assert y.shape == self._shapes[micro_batch], (
                f"{task.action} gives {y.shape}, not {self._shapes[micro_batch]}"
            )
            if self.trains:
                self._outputs[key] = get_gradient_edge(y)
            # A stage without layers gives its input, whose memory may be filled anew before this is sent.
            self._activations[key] = y.clone() if y is x else y.detach()
        elif self.trains:
            self._outputs[key] = y
        self.peak = max(self.peak, self._alive + 1)
        if self.trains:
            self._alive += 1
            self._keep(key, received)
        elif received is not None:
            self.buffers.give(received)

    def _run_backward(self, task: _Task, received: Tensor | None) -> None:
        self.syncs[task.action.stage].before_backward(task.last, deferred=False)
        self._backward(task, received)
        self._release(task.key)

    def _run_input_gradient(self, task: _Task, received: Tensor | None) -> None:
        self.syncs[task.action.stage].before_backward(task.last, deferred=True)
        with self.queue.defer(task.key):
            self._backward(task, received)

    def _run_weight_gradient(self, task: _Task, received: Tensor | None) -> None:
        self.queue.run(task.key)
        self.syncs[task.action.stage].after_weights(task.last)
        self._release(task.key)

    def _backward(self, task: _Task, received: Tensor | None) -> None:
        stage, micro_batch = key = task.key
        self.queue.splits = task.splits  # what is computed again must be what went forward
        output = self._outputs.pop(key)
        if stage + 1 == len(self.placement):
            torch.autograd.backward(output)
        else:
            self._keep(key, received)
            gradient = received if received is not None else self._gradients.pop((stage + 1, micro_batch))
            torch.autograd.backward(output, gradient)
        if stage > 0:
            x_gradient = self._inputs.pop(key).grad
            assert x_gradient is not None, f"stage {stage} does not depend on its input"
            self._gradients[key] = x_gradient

    def _keep(self, key: Key, received: Tensor | None) -> None:
        """Until the weight gradients are done, which may need it."""
        if received is not None:
            self._received.setdefault(key, []).append(received)

    def _release(self, key: Key) -> None:
        self._alive -= 1
        for buffer in self._received.pop(key, ()):
            self.buffers.give(buffer)

    def _send_activation(self, task: _Task, received: Tensor | None) -> None:
        assert task.outbox is not None
        task.outbox.send(self._activations.pop(task.key).contiguous())

    def _send_gradient(self, task: _Task, received: Tensor | None) -> None:
        assert task.outbox is not None
        task.outbox.send(self._gradients.pop(task.key).contiguous())

    def _post(self, task: _Task, received: Tensor | None) -> None:
        assert task.inbox is not None
        task.inbox.post(task.number)

    def _reduce(self, task: _Task, received: Tensor | None) -> None:
        self.syncs[task.action.stage].reduce()

    def _tied(self, task: _Task, received: Tensor | None) -> None:
        for stage in (0, len(self.placement) - 1):
            if (sync := self._unfinished.pop(stage, None)) is not None:
                sync.finish()
        assert self.add_tied is not None, "the plan ties weights that the executor was not given"
        self.add_tied()


def _mark(tasks: Sequence[_Task]) -> None:
    """What a task has to know of those after it."""
    split = {task.key for task in tasks if task.action.op is Op.INPUT_GRADIENT}
    for task in tasks:
        task.splits = task.key in split
    last_weights = {task.action.stage: task for task in tasks if task.action.op in WEIGHTS}
    last_backward = {task.action.stage: task for task in tasks if task.action.op in BACKWARDS}
    for task in last_weights.values():
        task.last = True
    for task in last_backward.values():
        task.last |= task.action.op is Op.INPUT_GRADIENT
    for task, following in pairwise(task for task in tasks if task.action.op in COMPUTE):
        if following.action.op is Op.WEIGHT_GRADIENT:
            task.prepares = following.key
