"""The training loop, the same on every rank.

    each step: batch -> plan -> executor (forward, backward, ZeRO) -> sums over all ranks, clipping -> optimizer
               -> metrics -> evaluation -> checkpoint

A run is started and continued by the same command: it goes on from the newest complete checkpoint in its directory, and
because nothing in it depends on anything but the config, the data and `consumed_samples`, it goes on bit for bit. Only
rank 0 writes; what ends the run, a signal too, ends it after the same step on all ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import megalm
from megalm import checkpoint
from megalm.checkpoint.weights import PREFIX
from megalm.config import Config, to_yaml
from megalm.config.batches import plan_batches
from megalm.config.sections import known
from megalm.data.loader import GlobalBatch, MicroBatch
from megalm.data.trace import first_hash, rolled
from megalm.errors import UserError
from megalm.launch.ranks import Process
from megalm.launch.slurm import SAVED
from megalm.launch.world import World
from megalm.model.counts import parameter_count, seen_pairs, training_flops
from megalm.model.transformer import ModelInputs
from megalm.ops.dropout import sequence_keys
from megalm.optim.gradients import clip, sum_copies, totals
from megalm.optim.schedule import learning_rate_factor
from megalm.parallel.pipeline.recording import Recording
from megalm.parallel.pipeline.timeline import TIMELINE
from megalm.train.build import (
    BYTES_A_PARAMETER,
    Inputs,
    Parts,
    build_inputs,
    build_model,
    build_parts,
    model_inputs,
    pinned,
)
from megalm.train.device import DTYPES, memory_bytes, peak_flops
from megalm.train.evaluate import evaluation_line, score_sources
from megalm.train.metrics import Metrics
from megalm.train.progress import Terminal, summary
from megalm.train.resume import differences, initial_checkpoint, refuse_another_run
from megalm.train.run_directory import check_directory, checkpoints_of, describe, mark_stopped, opened, private
from megalm.train.signals import StopRequest, in_seconds
from megalm.train.state import shards

logger = logging.getLogger("megalm")
SAVES = 50e6  # bytes a second that a rank is expected to save, before it has
RECORDED = 2  # the step whose timeline is kept, counted from the process's first, which is slower


@dataclass
class Position:
    """How far a run is; with the parameters and the optimizer's state, all that a checkpoint must hold."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    data_hash: str = ""
    """Of all samples so far (`megalm.data.trace`)."""


def run(load: Callable[[], Config], process: Process, stop: StopRequest, dry_run: bool = False) -> None:
    """Trains what the config that `load` gives says, from the start or from where its directory's newest checkpoint is,
    until `stop` on any rank.

    Raises a UserError before anything is written if something is wrong with the config or what it names, or if ranks
    differ. With `dry_run`, stops after all checks and a summary.
    """

    def prepare() -> Inputs:
        inputs = build_inputs(load(), process)
        check_directory(directory := Path(inputs.config.run.dir), inputs.config.run.group)
        checkpoints_of(inputs.config, directory)
        return replace(inputs, initial=initial_checkpoint(inputs))

    world, chief = World(process), process.rank == 0
    inputs = world.agree(prepare, facts, lambda inputs: inputs.config.run.timeout, lambda: stop.received is not None)
    directory = Path(inputs.config.run.dir)
    with Terminal(quiet=not chief) as terminal:
        terminal.say(summary(inputs))
        if dry_run:
            terminal.say("dry run: everything that can be checked is well; nothing was written")
            return
        group = inputs.config.run.group
        with private(group), world.joined(inputs.device, inputs.config.run.timeout), ExitStack() as stack:
            if chief:
                stack.enter_context(opened(directory, group))
            trainer = Trainer(inputs, directory)
            if chief:
                describe(inputs.config, directory)  # not before the run may go on: a refused one changes nothing
            trainer.train(terminal, stop)


def facts(inputs: Inputs) -> dict[str, str]:
    """What must be the same on all ranks."""
    model = build_model(inputs.config.model, torch.device("meta"), DTYPES[inputs.config.precision.compute])
    return {
        "config": to_yaml(inputs.config),
        "data": inputs.loader.fingerprint,
        "tokenizer": inputs.tokenizer.fingerprint,
        "plan of stages": str(inputs.stages),
        "run.init_from": checkpoint.read_manifest(inputs.initial).checksum if inputs.initial else "",
        "kind of device": inputs.device.type,
        "version of megalm": megalm.__version__,
        "version of torch": torch.__version__,
        "model": "\n".join(f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters()),
    }


class Trainer:
    """One rank's part of a run in its directory."""

    def __init__(self, inputs: Inputs, directory: Path) -> None:
        self.inputs, self.config, self.directory = inputs, inputs.config, directory
        self.batches = plan_batches(self.config.batch)
        self.parts: Parts = build_parts(inputs)
        self.mesh = self.parts.mesh
        self.position = Position(
            tokens_by_source=dict.fromkeys(inputs.loader.source_names, 0),
            data_hash=first_hash(inputs.loader.fingerprint),
        )
        self.steps = known(self.config.schedule.steps)
        self.parameters = parameter_count(self.config.model, known(self.config.model.vocab_size))
        settings = self.config.checkpoint
        self.saver = checkpoint.Saver(
            checkpoints_of(self.config, directory),
            settings.keep,
            settings.keep_every,
            self.mesh.world.group,
            settings.asynchronous,
        )
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self._said_to_wait, self._save_begun = False, 0.0
        self.stopping = False
        """Whether some rank had a reason to stop by the last step, as all ranks know."""
        self._resume()
        self._recorded = self.position.step + RECORDED

    def train(self, terminal: Terminal, stop: StopRequest) -> None:
        """All steps that are left, or until `stop` is received on any rank."""
        if self.position.step >= self.steps:
            logger.info("%s: complete: all %d steps are done", self.directory, self.steps)
            return
        stop.limit = in_seconds(self.config.run.time_limit)
        stop.slowest["save"] = max(1.0, self.parameters * BYTES_A_PARAMETER / self.mesh.layout.size / SAVES)
        self.peak = peak_flops(self.inputs.device, DTYPES[self.config.precision.compute])
        with ExitStack() as stack:
            metrics = stack.enter_context(closing(self._metrics())) if self.mesh.rank == 0 else None
            stream = stack.enter_context(closing(self.stream()))
            stack.callback(self.saver.abandon)
            terminal.start(self.steps, self.position.step)
            if self.position.step == 0:
                with stop.timed("evaluation"):
                    self._evaluate(metrics)
            while self.position.step < self.steps and not self.stopping:
                with stop.timed("step"):
                    values = self.step(stream, stop)
                done = self.position.step
                if metrics and (done % self.config.log.every == 0 or done == self.steps):
                    metrics.write(values)
                    terminal.step(values)
                last = done == self.steps
                if last or done % known(self.config.evaluate.every) == 0:
                    with stop.timed("evaluation"):
                        self._evaluate(metrics)
                if last or done % known(self.config.checkpoint.every) == 0:
                    with stop.timed("save"):
                        self._save(metrics)
            with stop.timed("save"):
                self._finish_saving(metrics)
            if self.stopping and self.position.step < self.steps:
                reason = stop.reason or "a signal to another rank, or its time limit"
                logger.info("%s: stopped after step %d; start again to go on", reason, self.position.step)
                if metrics:
                    mark_stopped(self.directory, f"{reason} after step {self.position.step} of {self.steps}")

    def _metrics(self) -> Metrics:
        last_line = self.position.step or -1  # a run that starts anew evaluates at step 0 anew
        events = self.directory / "tensorboard" if self.config.log.tensorboard else None
        return Metrics(self.directory / "metrics.jsonl", events, last_line)

    def stream(self) -> Generator[GlobalBatch, None, None]:
        """This data rank's batches. All pipeline and tensor ranks of it read the same."""
        finish = pinned if self.inputs.device.type == "cuda" else None
        data = self.mesh.data
        sizes = self._micro_sizes()
        return self.inputs.loader.stream(self.position.consumed_samples, sizes, data.rank, data.size, finish)

    def _micro_sizes(self) -> Iterator[list[int]]:
        """The micro-batch sizes of a data rank in each step that is left."""
        micro = known(self.config.batch.micro_size)
        for step in range(self.position.step, self.steps):
            yield [micro] * (self.batches.size(step) // self.mesh.data.size // micro)

    def step(self, stream: Iterator[GlobalBatch], stop: StopRequest) -> dict[str, Any]:
        """One update of the parameters; returns its metrics, the same on all ranks but for those of time."""
        started = time.perf_counter()
        samples = next(stream)
        waited = time.perf_counter() - started
        step, optimizer = self.position.step + 1, self.parts.optimizer
        counted = self._count(samples.parts)
        recording = Recording(self.mesh) if self.config.log.timeline and step == self._recorded else None
        nats = self.parts.passes.run(self._inputs(samples.parts), 1 / counted, recording)
        if recording is not None:
            self._write(recording, len(samples.parts))
        sum_copies(self.parts.held, self.mesh)
        found = totals(self.parts.held, self.mesh, self._sums(samples.parts, nats, stop), self.config.log.zeros)
        nats_of_all, pairs, memory, asked, written = found.sums
        loss, norm, self.stopping = nats_of_all / counted, found.norm, asked > 0
        if self.saver.pending is not None and written >= self.mesh.world.size:
            self._commit()
            stop.slowest["save"] = max(stop.slowest["save"], time.monotonic() - self._save_begun)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._commit()
            raise self._diverged(step, loss, norm)
        clip(self.parts.held, norm, self.config.optimizer.clip_norm or math.inf)
        learning_rate = self._learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self.saver.settle()
        optimizer.step()
        optimizer.zero_grad()
        self._advance(samples)

        seconds = time.perf_counter() - started
        tokens = len(samples.source_B) * self.config.data.sequence_length
        peak = self.peak * self.mesh.layout.size
        return {
            "step": step,
            "tokens": self.position.tokens,
            "loss": loss,
            "grad_norm": norm,
            **({} if found.zeros is None else {"grad_zeros": found.zeros / self.parameters}),
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / seconds,
            "mfu": training_flops(self.config.model, tokens, round(pairs)) / seconds / peak,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "memory_bytes": round(memory),
            "tokens_by_source": dict(self.position.tokens_by_source),
            "data_hash": self.position.data_hash,
        }

    def _count(self, batch: Sequence[MicroBatch]) -> int:
        """Tokens whose loss counts, of all data ranks, known before the forward pass: so no average of averages."""
        counted = sum(int(part.loss_mask_T.sum()) for part in batch)
        if self.mesh.data.group is not None:
            tensor = torch.tensor(counted, device=self.mesh.device)
            dist.all_reduce(tensor, group=self.mesh.data.group)
            counted = int(tensor)
        return max(1, counted)

    def _inputs(self, batch: Sequence[MicroBatch]) -> list[ModelInputs]:
        device, first = self.mesh.device, self.position.consumed_samples
        first += self.mesh.data.rank * sum(len(part.sources_B) for part in batch)
        inputs = []
        for part in batch:
            keys_B = None
            if self.config.model.dropout:
                samples_B = torch.arange(first, first + len(part.sources_B), device=device)
                keys_B = sequence_keys(self.config.run.seed, samples_B)
            inputs.append(model_inputs(part, device, keys_B))
            first += len(part.sources_B)
        return inputs

    def _sums(self, batch: Sequence[MicroBatch], nats: Tensor, stop: StopRequest) -> list[Tensor | float]:
        """What is added up over all ranks beside the gradient's norm: nats, pairs of tokens that see each other, bytes
        of memory, ranks that have a reason to stop, and ranks that have written their part of a checkpoint."""
        mesh, window = self.mesh, self.config.model.sliding_window
        pairs = 0
        if mesh.tensor.rank == 0 and mesh.pipeline.rank == 0:  # the others have the same micro-batches
            pairs = sum(seen_pairs(part.segments.tolist(), window) for part in batch)
        mine = nats if self.parts.passes.predicts else 0.0
        return [mine, pairs, memory_bytes(mesh.device), float(bool(stop.reason)), self.saver.progress]

    def _diverged(self, step: int, loss: float, norm: float) -> UserError:
        where = "there is no checkpoint yet" if self.saved is None else f"the last checkpoint is of step {self.saved}"
        return UserError(
            f"step {step}: loss {loss}, gradient norm {norm}: training has diverged; {where}: lower "
            f"optimizer.learning_rate={self.config.optimizer.learning_rate} or lengthen "
            f"schedule.warmup_steps={self.config.schedule.warmup_steps}"
        )

    def _advance(self, samples: GlobalBatch) -> None:
        position, length = self.position, self.config.data.sequence_length
        position.step += 1
        position.consumed_samples += len(samples.source_B)
        position.tokens += len(samples.source_B) * length
        counts = np.bincount(samples.source_B, minlength=len(self.inputs.loader.source_names))
        for name, count in zip(self.inputs.loader.source_names, counts.tolist(), strict=True):
            position.tokens_by_source[name] += count * length
        position.data_hash = rolled(position.data_hash, samples.source_B, samples.rank_B)

    def _learning_rate(self, step: int) -> float:
        schedule = self.config.schedule
        warmup, decay = known(schedule.warmup_steps), schedule.decay_steps or 0
        factor = learning_rate_factor(schedule.kind, step, self.steps, warmup, decay, schedule.min_ratio)
        return self.config.optimizer.learning_rate * factor

    def _evaluate(self, metrics: Metrics | None) -> None:
        if self.config.data.validation.samples == 0:
            return
        micro_size = known(self.config.batch.micro_size)
        scores = score_sources(self.parts.passes, self.inputs.tokenizer, self.inputs.loader, micro_size)
        line = evaluation_line(self.position.step, self.position.tokens, scores)
        if metrics:
            metrics.write(line)
        logger.info(
            "step %d: validation loss %.4f, %.4f bits per byte (%s)",
            line["step"],
            line["loss"],
            line["bits_per_byte"],
            ", ".join(f"{name} {part.loss:.4f}" for name, part in scores.items()),
        )

    def _write(self, recording: Recording, micro_batches: int) -> None:
        schedule, stages = self.config.parallel.pipeline.schedule, self.inputs.stages
        layers = [end - first for first, end in stages.bounds]
        recording.write(self.directory / TIMELINE, schedule, stages.placement, layers, micro_batches)

    def _save(self, metrics: Metrics | None) -> None:
        """Begins a checkpoint, which is committed after the step by which all ranks have written it, or at once."""
        if self.saver.pending is not None:
            started, step = time.perf_counter(), self.saver.pending
            self._commit()
            if not self._said_to_wait and (waited := time.perf_counter() - started) > 0.5:
                self._said_to_wait = True
                every = f"checkpoint.every={self.config.checkpoint.every} is too often for where they go"
                logger.warning("waited %.1f s for the checkpoint of step %d to be written: %s", waited, step, every)
        if metrics:
            metrics.sync()
        state = {
            "position": asdict(self.position),
            "data": self.inputs.loader.fingerprint,
            "sources": self.inputs.loader.source_fingerprints,
            "tokenizer": self.inputs.tokenizer.fingerprint,
            "config": self.config.model_dump(mode="json"),
        }
        self._save_begun = time.monotonic()
        self.saver.start(self.position.step, list(shards(self.parts)), state)
        if not self.config.checkpoint.asynchronous:
            self._commit()

    def _commit(self) -> None:
        """The checkpoint under way, if there is one, once all ranks have written it."""
        if (step := self.saver.pending) is not None:
            path = self.saver.commit()
            self.saved = step
            logger.info("%s %d, %s", SAVED, step, path)

    def _finish_saving(self, metrics: Metrics | None) -> None:
        """Ends with a checkpoint of the step that was taken last."""
        if max(self.saved or 0, self.saver.pending or 0) < self.position.step:
            self._save(metrics)
        self._commit()
        self.saver.close()

    def _resume(self) -> None:
        """Goes to the newest intact checkpoint, or takes the weights that a new run is to begin with."""
        accept = partial(refuse_another_run, inputs=self.inputs, batches=self.batches)
        refuse = self.config.checkpoint.on_corrupt == "refuse"
        held, group = list(shards(self.parts)), self.mesh.world.group
        found = checkpoint.load_newest(self.saver.root, held, group, accept, refuse)
        if found is None:
            self._begin_with_weights(held)
            return
        place, saved = found
        self.parts.publish()
        self.position = Position(**saved["position"])
        self.saved = self.position.step
        logger.info("continuing from %s", place)
        if changes := differences(saved["config"], self.config.model_dump(mode="json")):
            logger.info("changed since then: %s", ", ".join(changes))

    def _begin_with_weights(self, held: list[checkpoint.Shard]) -> None:
        if self.inputs.initial is None:
            return
        mine = [shard for shard in held if shard.name.startswith(PREFIX)]
        state = checkpoint.load(self.inputs.initial, mine, PREFIX, self.mesh.world.group)
        self.parts.publish()
        logger.info("a new run with the weights of %s", self.inputs.initial)
        if state["tokenizer"] not in (None, self.inputs.tokenizer.fingerprint):
            logger.warning("these came with another tokenizer file: do its ids mean the same as this run's?")
