"""`megalm data`: raw text to token shards, and a look into them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Tokenize text into training data, and look into it.", no_args_is_help=True)

Inputs = Annotated[
    list[Path],
    typer.Option("--input", metavar="PATH...", help="Files (.jsonl, .jsonl.gz, .txt) or folders of them."),
]
MoreInputs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[PATH...]", help="More inputs, as in `--input a b c`.", show_default=False),
]
TextKey = Annotated[str, typer.Option(help="Where a JSON line has its text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote to the output.")]


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(metavar="PATH", help="`byte`, a directory, a tokenizer.json or a .model.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.")],
    more_inputs: MoreInputs = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a CPU if not given.", show_default=False)] = None,
    text_key: TextKey = "text",
    max_skipped: Annotated[
        str | None,
        typer.Option(
            metavar="LIMIT",
            help="Faulty records to leave out before giving up: a count (100) or a share (1%). Otherwise 1%, or 10.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize documents into shards of tokens, in Megatron's format, with a manifest."""
    from megalm.cli import show
    from megalm.data.prepare import SkipLimit, prepare
    from megalm.data.sources import EMPTY

    watch = show.Stopwatch()
    limit = SkipLimit() if max_skipped is None else SkipLimit.parse(max_skipped)
    with show.progress("Tokenizing") as update:

        def on_progress(done: int, total: int, tokens: int) -> None:
            rates = f"{show.size(done / watch.seconds)}/s, {show.number(int(tokens / watch.seconds))} tokens/s"
            update(done, total, rates)

        report = prepare(
            [*inputs, *(more_inputs or [])],
            tokenizer,
            output,
            workers=workers if workers is not None else num_cpus(),
            text_key=text_key,
            limit=limit,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    manifest = report.manifest
    rows = [
        ("documents", show.number(manifest.documents)),
        ("text", show.size(manifest.text_bytes)),
        ("tokens", show.number(manifest.tokens)),
        ("bytes per token", f"{manifest.text_bytes / max(1, manifest.tokens - manifest.documents):.3f}"),
        ("shards", show.number(len(manifest.shards))),
        *((f"skipped, {reason}", show.number(count)) for reason, count in manifest.skipped.items()),
        ("time", f"{watch.seconds:.1f} s"),
        ("input", f"{show.size(report.input_bytes)}, {show.size(report.input_bytes / watch.seconds)}/s"),
    ]
    show.table(f"Prepared {output}", rows)
    faulty = sum(count for reason, count in manifest.skipped.items() if reason != EMPTY)
    for number, example in enumerate(report.examples):
        more = "" if number < len(report.examples) - 1 or faulty == number + 1 else f" (and {faulty - number - 1} more)"
        typer.echo(f"skipped {show.printable(example)}{more}")
    if report.ignored:
        kinds = ", ".join(f"{suffix}: {count}" for suffix, count in report.ignored.items())
        typer.echo(f"left alone files of other kinds in the input folders ({show.printable(kinds)})")


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
