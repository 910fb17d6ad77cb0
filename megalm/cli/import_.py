"""`megalm import`: a directory of transformers to a checkpoint that a run can start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Holds config.json and model.safetensors.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.", show_default=False)],
) -> None:
    """Take over a Llama, Mistral, Qwen or GPT-2 model to continue its pre-training."""
    from megalm.train.exchange import import_

    text = import_(directory, output, say=lambda line: typer.echo(line, err=True))
    typer.echo(text + f"# written to {output / 'config.yaml'}")
