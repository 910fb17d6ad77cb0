"""`megalm export`: a checkpoint to a directory that transformers loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from megalm.cli.model import CheckpointPath
from megalm.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def export(
    checkpoint: CheckpointPath,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.", show_default=False)],
    step: Annotated[int | None, typer.Option(min=0, help="Which step's; the newest.", show_default=False)] = None,
    average: Annotated[int, typer.Option(min=1, metavar="K", help="The mean of the K newest, up to that step.")] = 1,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="Of the weights; what the run computed in.", show_default=False),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="The most that one file may hold.")] = "5GB",
) -> None:
    """Write a model as Llama, Mistral, Qwen or GPT-2 for transformers, with its tokenizer and a model card."""
    from megalm.cli import show
    from megalm.train.exchange import export

    match = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([KMG]?B?)", shard_size.upper())
    if match is None or match[2] not in UNITS or not (limit := int(float(match[1]) * UNITS[match[2]])):
        raise UserError(f"--shard-size={shard_size} is no size: write it like 5GB or 500MB")
    with show.progress("Exporting") as update:
        size = export(
            checkpoint,
            output,
            step,
            average,
            dtype,
            limit,
            on_progress=lambda done, total: update(done, total, ""),
            say=lambda line: typer.echo(line, err=True),
        )
    typer.echo(f"Wrote {output}: {show.size(size)} of weights")
