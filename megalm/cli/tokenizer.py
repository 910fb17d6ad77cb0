"""`megalm tokenizer`: makes a tokenizer from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.data import Inputs, MoreInputs, Overwrite, TextKey

app = typer.Typer(help="Make a tokenizer.", no_args_is_help=True)


@app.command()
def train(
    inputs: Inputs,
    kind: Annotated[str, typer.Option(metavar="sentencepiece|bpe", help="The library that trains and runs it.")],
    vocab_size: Annotated[int, typer.Option(help="Number of ids, the end-of-document token among them.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.")],
    more_inputs: MoreInputs = None,
    text_key: TextKey = "text",
    sample_bytes: Annotated[int, typer.Option(help="About how much text to train on, taken evenly from all.")] = 2**29,
    overwrite: Overwrite = False,
) -> None:
    """Train a lossless byte-pair encoding on text."""
    from megalm.cli import show
    from megalm.data.train_tokenizer import train_tokenizer

    with show.progress("Reading") as update:

        def on_progress(done: int, total: int) -> None:
            update(done, total, "merging pairs" if done == total else "")

        report = train_tokenizer(
            kind,
            vocab_size,
            [*inputs, *(more_inputs or [])],
            output,
            text_key=text_key,
            sample_bytes=sample_bytes,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    measured = f"{show.size(report.held_bytes)} of held-out text" if report.held_bytes else "the text it was trained on"
    skipped = "".join(f"; skipped {show.number(count)}: {reason}" for reason, count in report.skipped.items())
    typer.echo(
        f"Wrote {output}: {report.kind}, {show.number(report.vocab_size)} ids, {report.bytes_per_token:.2f} bytes per "
        f"token on {measured}, trained on {show.number(report.documents)} documents, {show.size(report.text_bytes)}"
        f"{show.printable(skipped)}"
    )
