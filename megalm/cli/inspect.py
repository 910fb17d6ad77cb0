"""`megalm data inspect` and `megalm data verify`: what prepared data reads like, and whether it is intact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `megalm data prepare` wrote.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to show, evenly from all.")] = 3,
    sample: Annotated[
        int | None,
        typer.Option(
            min=0, help="Training sample to show, in the order of the text; the first, if any.", show_default=False
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a training sample.")] = 256,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the tokenizer is now, if it was moved.", show_default=False),
    ] = None,
) -> None:
    """Show totals, a few documents, and a training sample with its document boundaries."""
    from megalm.cli import show
    from megalm.data import inspect
    from megalm.data.manifest import Manifest
    from megalm.data.tokenizer import load_tokenizer

    manifest = Manifest.load(directory)
    rows = [
        ("documents", show.number(manifest.documents)),
        ("text", show.size(manifest.text_bytes)),
        ("tokens", show.number(manifest.tokens)),
        ("bytes per token", f"{manifest.text_bytes / max(1, manifest.tokens - manifest.documents):.3f}"),
        ("tokens per document", f"{manifest.tokens / max(1, manifest.documents):.1f}"),
        ("shards", show.number(len(manifest.shards))),
        ("stored as", manifest.dtype),
        ("tokenizer", f"{manifest.tokenizer.kind}, {show.number(manifest.tokenizer.vocab_size)} ids"),
        *((f"skipped, {reason}", show.number(count)) for reason, count in manifest.skipped.items()),
        ("fingerprint", manifest.fingerprint),
    ]
    if sample is None and documents and inspect.num_samples(manifest, sequence_length):
        sample = 0
    if not documents and sample is None:  # nothing to decode
        show.table(str(directory), rows)
        return
    decoder = load_tokenizer(tokenizer or manifest.tokenizer.path)
    shown = None if sample is None else inspect.sample(directory, manifest, decoder, sample, sequence_length)
    show.table(str(directory), rows)
    for document in inspect.documents(directory, manifest, decoder, documents):
        text = document.text if len(document.text) <= 400 else document.text[:400] + " ..."
        typer.echo(f"\n--- {document.shard}, document {document.document}, {show.number(document.tokens)} tokens")
        typer.echo(show.printable(text))
    if shown:
        last = shown.first + sequence_length - 1
        typer.echo(
            f"\n=== training sample {shown.number} of {show.number(shown.of)}: tokens {show.number(shown.first)} to "
            f"{show.number(last)}"
        )
        for segment in shown.segments:
            end = " <end of document>" if segment.ended else " <cut>"
            typer.echo(
                f"--- its tokens {segment.first} to {segment.first + segment.tokens - 1}, positions from 0: "
                f"{segment.tokens} tokens, {segment.in_loss} in the loss"
            )
            typer.echo(show.printable(segment.text) + end)


def verify(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="What `megalm data prepare` wrote.")],
) -> None:
    """Check every byte of prepared data against its manifest, and list all that is wrong."""
    from megalm.cli import show
    from megalm.data.verify import verify as find_problems
    from megalm.errors import UserError

    problems: list[str] = []
    for directory in directories:
        try:
            with show.progress(f"Checking {directory}") as update:
                found = find_problems(directory, lambda done, total: update(done, total, show.size(done)))
        except UserError as error:
            found = [str(error)]
        problems += found
        typer.echo(f"{directory}: {'intact' if not found else f'{len(found)} problems'}")
        for problem in found:
            typer.echo(f"  {show.printable(problem)}")
    if problems:
        more = f" (and {len(problems) - 1} more, listed above)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}: prepare the data again")
