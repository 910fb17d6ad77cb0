"""`megalm generate`: a checkpoint goes on with a text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli import show

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", exists=True, help="A run directory or one step's.", show_default=False)
]


def generate(
    checkpoint: CheckpointPath,
    prompt: Annotated[str, typer.Option(help="Text to go on with.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="Below 1 sharper, above 1 flatter; 0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws.")] = 0,
) -> None:
    """Write on from a prompt."""
    from megalm.train.generate import continuation
    from megalm.train.run_directory import load_model

    pieces = continuation(load_model(checkpoint), prompt, max_new_tokens, temperature, top_p, seed)
    for piece in itertools.chain([prompt], pieces, ["\n"]):
        print(show.printable(piece), end="", flush=True)
