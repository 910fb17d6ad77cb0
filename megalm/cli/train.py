"""`megalm train`: a config to a run."""

from __future__ import annotations

from typing import Annotated

import typer

from megalm.cli.config import ConfigFile, Overrides


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all that can be checked, then stop.")] = False,
) -> None:
    """Train a model, or go on from its run's last checkpoint."""
    from megalm.config import load_config

    resolved = load_config(config, overrides or ())

    from megalm.train.signals import StopRequest

    with StopRequest() as stop:  # from here on a signal ends a run well; importing torch alone takes seconds
        from megalm.train.trainer import run

        run(resolved, stop, dry_run)
