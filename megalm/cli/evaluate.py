"""`megalm evaluate`: how well a checkpoint predicts prepared data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.generate import CheckpointPath


def evaluate(
    checkpoint: CheckpointPath,
    data: Annotated[
        list[Path],
        typer.Option(metavar="DIR...", exists=True, file_okay=False, help="Prepared data.", show_default=False),
    ],
    more_data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR...]", exists=True, file_okay=False, help="More, as in `--data a b`.", show_default=False
        ),
    ] = None,
) -> None:
    """Print loss, perplexity and bits per byte for each source."""
    from megalm.train.evaluate import evaluate_command

    evaluate_command(checkpoint, [*data, *(more_data or [])])
