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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from megalm.train.evaluate import Score, evaluate_directory
    from megalm.train.run_directory import load_model

    trained = load_model(checkpoint)
    table = Table("source", "part", box=None)
    for column in ("sequences", "tokens", "loss", "perplexity", "bits/byte"):
        table.add_column(column, justify="right", no_wrap=True)
    total = Score(0.0, 0, 0)

    def add_row(name: str, part: str, sequences: str, score: Score) -> None:
        ratios = (f"{score.loss:.4f}", f"{score.perplexity:.2f}", f"{score.bits_per_byte:.4f}")
        table.add_row(Text(name), part, sequences, f"{score.tokens:,}", *ratios)

    for directory in (directories := [*data, *(more_data or [])]):
        result = evaluate_directory(trained, directory)
        add_row(directory.name, result.part, f"{result.sequences:,}", result.score)
        total += result.score
    if len(directories) > 1:
        add_row("together", "", "", total)
    Console().print(table)
