"""`megalm data merge`: prepared directories to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.data import Overwrite


def merge(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What `megalm data prepare` wrote.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Join prepared directories of one tokenizer into one with a single large shard."""
    from megalm.cli import show
    from megalm.data.merge import merge

    with show.progress("Merging") as update:
        manifest = merge(
            directories,
            output,
            overwrite=overwrite,
            on_progress=lambda what, done, total: update(done, total, what),
        )
    typer.echo(
        f"Wrote {output}: {show.number(manifest.documents)} documents, {show.number(manifest.tokens)} tokens, from "
        f"{show.number(len(directories))} directories"
    )
