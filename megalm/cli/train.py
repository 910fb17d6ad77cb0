"""`megalm train`: a config to a run, in this process or in several."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.config import ConfigFile, MaxRestarts, Overrides
from megalm.errors import UserError

if TYPE_CHECKING:
    from megalm.config import Config


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all that can be checked, then stop.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes to start on this machine; else as many as the config's layout needs, and where its data "
            "ranks are `auto` as the GPUs allow.",
            show_default=False,
        ),
    ] = None,
    max_restarts: MaxRestarts = 0,
) -> int:
    """Train a model, or go on from its run's last checkpoint."""
    from megalm.config import load_config
    from megalm.config.load import fitting_processes
    from megalm.launch.ranks import STARTED, who_am_i

    process = who_am_i(os.environ)
    launched = bool(process.address)
    if launched and (nproc or max_restarts):
        option = f"--nproc={nproc}" if nproc else f"--max-restarts={max_restarts}"
        raise UserError(f"{option}: another launcher has started {process.size} processes: leave it out")
    size = process.size if launched else nproc or fitting_processes(config, overrides or (), devices)
    if not launched and (size > 1 or max_restarts):
        section = load_config(config, overrides or (), size).run  # mistakes show at once

        from megalm.launch.local import start_local
        from megalm.launch.restarts import with_restarts
        from megalm.train.signals import in_seconds

        arguments = [str(config), *(overrides or ()), *(["--dry-run"] if dry_run else [])]
        started = int(time.time())
        until = started + in_seconds(section.time_limit)
        os.environ[STARTED] = str(started)  # for the ranks
        try:
            return with_restarts(lambda: start_local(size, arguments), max_restarts, Path(section.dir), until)
        finally:
            del os.environ[STARTED]

    alone = load_config(config, overrides or (), size) if size == 1 else None  # as above

    from megalm.train.signals import StopRequest

    with StopRequest(process.started) as stop:  # a signal ends a run well now; importing torch alone takes seconds
        from megalm.train.trainer import run

        run(lambda: alone or load_config(config, overrides or (), size), process, stop, dry_run)
    return 0


def devices(config: Config) -> int:
    """The GPUs that a run may have on this machine."""
    if config.run.device == "cpu":
        return 0

    import torch

    return torch.cuda.device_count()
