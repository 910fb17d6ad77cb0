"""`megalm train`: a config to a run, in this process or in several."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from megalm.cli.config import ConfigFile, Overrides
from megalm.errors import UserError


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all that can be checked, then stop.")] = False,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Start so many processes on this machine, such as one a GPU.", show_default=False),
    ] = None,
) -> int:
    """Train a model, or go on from its run's last checkpoint."""
    from megalm.config import load_config
    from megalm.launch.ranks import who_am_i

    process = who_am_i(os.environ)
    if nproc is not None:
        if process.size > 1:
            raise UserError(f"--nproc={nproc}: another launcher has started {process.size} processes: leave it out")
        load_config(config, overrides or (), nproc)  # mistakes show at once

        from megalm.launch.local import start_local

        return start_local(nproc, [str(config), *(overrides or ()), *(["--dry-run"] if dry_run else [])])

    alone = load_config(config, overrides or ()) if process.size == 1 else None  # as above

    from megalm.train.signals import StopRequest

    with StopRequest() as stop:  # from here on a signal ends a run well; importing torch alone takes seconds
        from megalm.train.trainer import run

        run(lambda: alone or load_config(config, overrides or (), process.size), process, stop, dry_run)
    return 0
