"""The training loop.

    each step: batch -> plan -> executor (forward, backward) -> clip -> AdamW -> metrics -> evaluation -> checkpoint

A run is started and continued by the same command: it goes on from the newest complete checkpoint in its directory, and
because nothing in it depends on anything but the config, the data and `consumed_samples`, it goes on bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalm import checkpoint
from megalm.config import Config
from megalm.config.batches import plan_batches
from megalm.config.sections import known
from megalm.data.loader import GlobalBatch
from megalm.data.trace import first_hash, rolled
from megalm.errors import UserError
from megalm.model.counts import seen_pairs, training_flops
from megalm.ops.dropout import sequence_keys
from megalm.optim.schedule import learning_rate_factor
from megalm.parallel.pipeline.executor import Executor
from megalm.parallel.pipeline.plan import one_stage_plan
from megalm.parallel.zero.sync import NoSync
from megalm.train.build import Inputs, Parts, build_inputs, build_parts, model_inputs, pinned
from megalm.train.device import DTYPES, memory_bytes, peak_flops
from megalm.train.evaluate import evaluation_line, score_sources
from megalm.train.metrics import Metrics
from megalm.train.progress import Terminal, summary
from megalm.train.resume import differences, refuse_another_run
from megalm.train.run_directory import CHECKPOINTS, check_directory, describe, opened
from megalm.train.signals import StopRequest

logger = logging.getLogger("megalm")


@dataclass
class Position:
    """How far a run is; with the parameters and the optimizer's state, all that a checkpoint must hold."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    data_hash: str = ""
    """Of all samples so far (`megalm.data.trace`)."""


def run(config: Config, stop: StopRequest, dry_run: bool = False) -> None:
    """Trains what `config` says, from the start or from where its directory's newest checkpoint is, until `stop`.

    Raises a UserError before anything is written if something is wrong with the config or what it names. With
    `dry_run`, stops after all checks and a summary.
    """
    inputs, directory = build_inputs(config), Path(config.run.dir)
    check_directory(directory)
    with Terminal() as terminal:
        terminal.say(summary(inputs))
        if dry_run:
            terminal.say("dry run: everything that can be checked is well; nothing was written")
            return
        with opened(directory):
            trainer = Trainer(inputs, directory)
            describe(inputs.config, directory)  # not before the run may go on: a refused one changes nothing
            trainer.train(terminal, stop)


class Trainer:
    """One run in its directory."""

    def __init__(self, inputs: Inputs, directory: Path) -> None:
        self.inputs, self.config, self.directory = inputs, inputs.config, directory
        self.batches = plan_batches(self.config.batch)
        self.parts: Parts = build_parts(self.config, inputs.device)
        self.position = Position(
            tokens_by_source=dict.fromkeys(inputs.loader.source_names, 0),
            data_hash=first_hash(inputs.loader.fingerprint),
        )
        self.steps = known(self.config.schedule.steps)
        self.saved: int | None = None
        """The step of the newest checkpoint."""
        self._resume()

    def train(self, terminal: Terminal, stop: StopRequest) -> None:
        """All steps that are left, or until `stop` is received."""
        if self.position.step >= self.steps:
            logger.info("%s: complete: all %d steps are done", self.directory, self.steps)
            return
        self.peak = peak_flops(self.inputs.device, DTYPES[self.config.precision.compute])
        last_line = self.position.step or -1  # a run that starts anew evaluates at step 0 anew
        events = self.directory / "tensorboard" if self.config.log.tensorboard else None
        with (
            closing(Metrics(self.directory / "metrics.jsonl", events, last_line)) as metrics,
            closing(self._stream()) as stream,
        ):
            terminal.start(self.steps, self.position.step)
            if self.position.step == 0:
                self._evaluate(metrics)
            while self.position.step < self.steps and stop.received is None:
                values = self._step(stream)
                done = self.position.step
                if done % self.config.log.every == 0 or done == self.steps:
                    metrics.write(values)
                    terminal.step(values)
                last = done == self.steps
                if last or done % known(self.config.evaluate.every) == 0:
                    self._evaluate(metrics)
                if last or done % known(self.config.checkpoint.every) == 0:
                    self._save(metrics)
            if (self.saved or 0) < self.position.step:
                self._save(metrics)
            if stop.received is not None:
                logger.info("%s: stopped after step %d; start again to go on", stop.received.name, self.position.step)

    def _stream(self) -> Generator[GlobalBatch, None, None]:
        finish = pinned if self.inputs.device.type == "cuda" else None
        return self.inputs.loader.stream(self.position.consumed_samples, self._micro_sizes(), finish=finish)

    def _micro_sizes(self) -> Iterator[list[int]]:
        """The micro-batch sizes of each step that is left."""
        micro = known(self.config.batch.micro_size)
        for step in range(self.position.step, self.steps):
            yield [micro] * (self.batches.size(step) // micro)

    def _step(self, stream: Iterator[GlobalBatch]) -> dict[str, Any]:
        """One update of the parameters; returns its metrics."""
        started = time.perf_counter()
        samples = next(stream)
        batch = samples.parts
        waited = time.perf_counter() - started
        model, optimizer, device = self.parts.model, self.parts.optimizer, self.inputs.device
        counted = max(1, sum(int(part.loss_mask_T.sum()) for part in batch))
        nats = torch.zeros((), dtype=torch.float64, device=device)

        def forward(stage: int, i: int, x_TD: Tensor | None) -> Tensor:
            micro = len(batch[i].sources_B)
            samples_B = torch.arange(micro, device=device) + (self.position.consumed_samples + i * micro)
            keys_B = sequence_keys(self.config.run.seed, samples_B) if self.config.model.dropout else None
            objective, cross_entropy = model(model_inputs(batch[i], device, keys_B), scale=1 / counted)
            nats.add_(cross_entropy)
            return objective

        Executor(one_stage_plan(len(batch))[0], {0: NoSync()}).step(forward)
        clip = self.config.optimizer.clip_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        loss = nats.item() / counted
        step = self.position.step + 1
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = (
                "there is no checkpoint yet" if self.saved is None else f"the last checkpoint is of step {self.saved}"
            )
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: training has diverged; {where}: lower "
                f"optimizer.learning_rate={self.config.optimizer.learning_rate} or lengthen "
                f"schedule.warmup_steps={self.config.schedule.warmup_steps}"
            )
        learning_rate = self._learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        self._advance(samples)

        seconds = time.perf_counter() - started
        tokens = sum(len(part.tokens_T) for part in batch)
        pairs = sum(seen_pairs(part.segments.tolist(), self.config.model.sliding_window) for part in batch)
        return {
            "step": step,
            "tokens": self.position.tokens,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / seconds,
            "mfu": training_flops(self.config.model, tokens, pairs) / seconds / self.peak,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "memory_bytes": memory_bytes(device),
            "tokens_by_source": dict(self.position.tokens_by_source),
            "data_hash": self.position.data_hash,
        }

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

    def _evaluate(self, metrics: Metrics) -> None:
        if self.config.data.validation.samples == 0:
            return
        held_out = self.inputs.loader.validation(known(self.config.batch.micro_size))
        scores = score_sources(self.parts.model, self.inputs.tokenizer, held_out)
        line = evaluation_line(self.position.step, self.position.tokens, scores)
        metrics.write(line)
        logger.info(
            "step %d: validation loss %.4f, %.4f bits per byte (%s)",
            line["step"],
            line["loss"],
            line["bits_per_byte"],
            ", ".join(f"{name} {part.loss:.4f}" for name, part in scores.items()),
        )

    def _save(self, metrics: Metrics) -> None:
        """Writes a checkpoint."""
        metrics.sync()
        state = {
            "position": asdict(self.position),
            "data": self.inputs.loader.fingerprint,
            "sources": self.inputs.loader.source_fingerprints,
            "tokenizer": self.inputs.tokenizer.fingerprint,
            "config": self.config.model_dump(mode="json"),
        }
        root = self.directory / CHECKPOINTS
        shards = checkpoint.whole(self.parts.tensors())
        checkpoint.save(root, self.position.step, shards, state, self.config.checkpoint.keep)
        self.saved = self.position.step

    def _resume(self) -> None:
        """Goes to the newest intact checkpoint, if there is one."""
        root = self.directory / CHECKPOINTS
        for found in checkpoint.candidates(root):
            accept = partial(refuse_another_run, found, inputs=self.inputs, batches=self.batches)
            try:
                saved = checkpoint.load(found, checkpoint.whole(self.parts.tensors()), accept=accept)
            except checkpoint.DamagedCheckpoint as damage:
                logger.warning("%s; trying the one before", damage)
                continue
            self.position = Position(**saved["position"])
            self.saved = self.position.step
            logger.info("continuing from %s", found)
            if changes := differences(saved["config"], self.config):
                logger.info("changed since then: %s", ", ".join(changes))
            return
        if root.is_dir() and any(root.glob("step-*")):
            raise UserError(f"{root}: no checkpoint is intact: choose another run.dir or remove this one")
