"""What the commands that look at a checkpoint's model have in common: which one, and in how many processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.errors import UserError

if TYPE_CHECKING:
    from megalm.launch.ranks import Process

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", exists=True, help="A run directory or one step's.", show_default=False)
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, help="Start so many processes, in the run's layout or that of --set.", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, such as parallel.tensor=2.", show_default=False),
]


def in_processes(
    checkpoint: Path,
    nproc: int | None,
    settings: Sequence[str] | None,
    context: typer.Context,
    work: Callable[[Process], None],
) -> int:
    """`work` in this process or, if there shall be several and no launcher has made them, the same command in each."""
    from megalm.launch.ranks import Process, who_am_i

    process = who_am_i(os.environ)
    if nproc in (None, process.size):
        work(process)
        return 0
    if process.size > 1:
        raise UserError(f"--nproc={nproc}: another launcher has started {process.size} processes: leave it out")

    from megalm.launch.local import start_local
    from megalm.train.trained import find_model

    find_model(checkpoint, Process(size=nproc or 1), settings or ())  # mistakes show at once
    return start_local(nproc or 1, context.find_root().obj, "megalm")
