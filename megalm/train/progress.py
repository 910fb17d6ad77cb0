"""What a run shows in the terminal: a summary before it starts; while it runs a bar, or plain lines where the output is
no terminal. Everything that the "megalm" logger says comes out above the bar."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from megalm.config.batches import plan_batches
from megalm.config.sections import Parallel, Stage, known
from megalm.data.needs import table
from megalm.model.counts import parameter_count
from megalm.train.build import BYTES_A_PARAMETER, Inputs, layout_of

logger = logging.getLogger("megalm")


def summary(inputs: Inputs) -> str:
    """What is about to be trained, in a few lines."""
    config, model = inputs.config, inputs.config.model
    parameters = parameter_count(model, known(model.vocab_size))
    steps = known(config.schedule.steps)
    tokens = plan_batches(config.batch).first_sample(steps) * config.data.sequence_length
    up_to = "up to " if config.batch.ramp else ""
    stages = "".join(f"; stage {stage.name} " + _stage(stage) for stage in config.data.stages or [])
    return "\n".join(
        [
            f"model    {parameters:,} parameters: {model.num_layers} layers, hidden {model.hidden_size}, "
            f"{model.num_heads} heads ({model.num_kv_heads} key/value), feed-forward {model.ffn_size}, "
            f"vocabulary {model.vocab_size:,}",
            f"data     sequences of {config.data.sequence_length:,} tokens, order {config.data.order}{stages}",
            *(f"         {line}" for line in table(inputs.needs)),
            f"run      {steps:,} steps of {up_to}{config.batch.global_size:,} sequences, {tokens:,} tokens in all, "
            f"{tokens / parameters:.1f} a parameter",
            f"device   {inputs.device.type}, {config.precision.compute}, "
            f"{parameters * BYTES_A_PARAMETER / 2**20:,.0f} MiB for parameters, gradients and optimizer state",
            *_layout(config.parallel),
        ]
    )


def _layout(parallel: Parallel) -> list[str]:
    """How several processes share the work."""
    layout, pipeline = layout_of(parallel), parallel.pipeline
    if layout.size == 1:
        return []
    parts = [f"tensor {layout.tensor}"] if layout.tensor > 1 else []
    if layout.pipeline > 1:
        parts.append(f"pipeline {layout.pipeline} ({pipeline.schedule}, {pipeline.chunks} stages a rank)")
    if layout.data > 1:
        parts.append(f"data {layout.data} (ZeRO {parallel.zero.stage}, shards of {layout.data_shard})")
    return [f"layout   {layout.size} processes: {', '.join(parts)}"]


def _stage(stage: Stage) -> str:
    total = sum(stage.weights.values())
    blend = ", ".join(f"{name} {weight / total:.0%}" for name, weight in stage.weights.items())
    return f"({f'{stage.tokens:,} tokens' if stage.tokens else 'to the end'}): {blend}"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader has gone, such as `head`; the run goes on, and its log file has all that is said."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal(logging.Handler):
    """The bar and the lines above it; with `quiet`, on ranks that only help, nothing."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self.console = _Console(quiet=quiet)
        whole = Column(no_wrap=True)
        self.bar = Progress(
            BarColumn(bar_width=None, table_column=Column(ratio=1)),  # gives way to the words where there is no room
            MofNCompleteColumn(table_column=whole),
            TextColumn("{task.description}", table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            expand=True,
        )

    def __enter__(self) -> Terminal:
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        logger.removeHandler(self)

    def start(self, steps: int, done: int) -> None:
        """Shows the bar, with `done` of `steps`."""
        self.task = self.bar.add_task("", total=steps, completed=done)
        self.bar.start()

    def step(self, values: dict[str, Any]) -> None:
        """Shows a logged step; the log file gets its line in any case."""
        line = (
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  grad norm {values['grad_norm']:.2f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  mfu {values['mfu']:.0%}"
        )
        short = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        self.bar.update(self.task, completed=values["step"], description=short)
        logger.info("step %d: %s", values["step"], line, extra={"shown_by_bar": True})

    def emit(self, record: logging.LogRecord) -> None:
        if not (self.console.is_terminal and hasattr(record, "shown_by_bar")):
            self.say(record.getMessage())

    def say(self, text: str) -> None:
        """Shows lines, above the bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
