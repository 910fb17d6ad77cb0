"""`megalm data`: raw text to token shards, and a look into them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megalm.data.counts import Counts
    from megalm.data.prepare import Report

MOST_SOURCES = 20  # that are shown one by one

app = typer.Typer(help="Tokenize text into training data, and look into it.", no_args_is_help=True)

Inputs = Annotated[
    list[Path],
    typer.Option(
        "--input", metavar="PATH...", help="Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt) or folders of them."
    ),
]
MoreInputs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[PATH...]", help="More inputs, as in `--input a b c`.", show_default=False),
]
TextKey = Annotated[str, typer.Option(help="Where a JSON line, or a row, has its text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote to the output.")]

MaxSkipped = Annotated[
    str | None,
    typer.Option(
        metavar="LIMIT",
        help="Faulty records to leave out before giving up: a count (100) or a share (1%). Otherwise 1%, or 10.",
        show_default=False,
    ),
]
Workers = Annotated[int | None, typer.Option(help="Processes; one a CPU if not given.", show_default=False)]


@app.command()
def prepare(
    inputs: Inputs,
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH", help="`byte`, a directory, a tokenizer.json, a .model or a .tiktoken file.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The directory to write.")],
    more_inputs: MoreInputs = None,
    workers: Workers = None,
    text_key: TextKey = "text",
    max_skipped: MaxSkipped = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="auto|reference|gigatoken",
            help="What encodes; the ids are the same. gigatoken is fast, and used if it is there and proves right.",
        ),
    ] = "auto",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Which of --world-size commands on one file system this is; as Slurm says if not given.",
            show_default=False,
        ),
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(help="How many commands share the work.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize documents into shards of tokens, in Megatron's format, with a manifest.

    DIR appears when all is done. Until then the work lies beside it, in .DIR.work: the same command, run again after it
    was interrupted or failed, does what is missing. If that is not wanted, delete .DIR.work.
    """
    from megalm.cli import show
    from megalm.data.counts import SkipLimit
    from megalm.data.prepare import Progress, Settings, prepare
    from megalm.data.share import find_share

    watch = show.Stopwatch()
    limit = SkipLimit() if max_skipped is None else SkipLimit.parse(max_skipped)
    share = find_share(rank, world_size)
    if share.origin:
        typer.echo(f"rank {share.rank} of {share.world_size}, as {share.origin} says", err=True)
    with show.progress("Tokenizing") as update:

        def on_progress(at: Progress) -> None:
            speed = show.size((at.done - at.done_before) / watch.seconds)
            tokens = show.number(int(at.tokens / watch.seconds))
            update(at.done, at.total, f"{speed}/s, {tokens} tokens/s, ETA")

        report = prepare(
            [*inputs, *(more_inputs or [])],
            tokenizer,
            output,
            Settings(text_key=text_key),
            workers=workers if workers is not None else num_cpus(),
            limit=limit,
            overwrite=overwrite,
            engine=engine,
            share=share,
            on_progress=on_progress,
            say=lambda line: typer.echo(line, err=True),
        )
    show_report(report, output, watch.seconds)


def show_report(report: Report, output: Path, seconds: float) -> None:
    """Prints what was prepared, in all and by source."""
    from megalm.cli import show
    from megalm.data.counts import total

    whole = total(report.sources.values())
    units = f"{report.units_done} of {report.units}"
    read = report.input_bytes - report.done_before
    rows = [
        ("documents", show.number(whole.documents)),
        ("text", show.size(whole.text_bytes)),
        ("tokens", show.number(whole.tokens)),
        ("bytes per token", _ratio(whole)),
        ("shards", show.number(len(report.manifest.shards))) if report.manifest else ("units done", units),
        *((f"skipped, {reason}", show.number(count)) for reason, count in sorted(whole.skipped.items())),
        ("time", f"{seconds:.1f} s"),
        ("input", f"{show.size(read)}, {show.size(read / seconds)}/s"),
        *([("input, done before", show.size(report.done_before))] if report.done_before else []),
        *([("encoded by", report.engine)] if report.engine else []),
    ]
    show.table(f"Prepared {output}" if report.manifest else f"Not yet all of {output}", rows)
    if len(report.sources) > 1:
        _show_sources(report.sources)
    show_faults(report.examples, whole.faulty.total())
    if report.ignored:
        kinds = ", ".join(f"{suffix}: {count}" for suffix, count in report.ignored.items())
        typer.echo(f"left alone files of other kinds in the input folders ({show.printable(kinds)})")
    if not report.manifest:
        typer.echo(f"this rank is done: {output} appears when the other ranks are, too")


def show_faults(examples: list[str], faulty: int) -> None:
    """Prints the first faulty records, and of how many they are."""
    from megalm.cli import show

    for number, example in enumerate(examples):
        more = "" if number < len(examples) - 1 or faulty == number + 1 else f" (and {faulty - number - 1} more)"
        typer.echo(f"skipped {show.printable(example)}{more}")


def _show_sources(sources: dict[str, Counts]) -> None:
    from megalm.cli import show

    header = ("source", "documents", "text", "tokens", "bytes per token", "skipped")
    rows = [
        (
            show.printable(source),
            show.number(counts.documents),
            show.size(counts.text_bytes),
            show.number(counts.tokens),
            _ratio(counts),
            show.number(counts.skipped.total()),
        )
        for source, counts in sources.items()
    ]
    shown = rows[:MOST_SOURCES]
    show.table("By source", shown, header)
    if len(rows) > len(shown):
        typer.echo(f"and {len(rows) - len(shown)} more sources, in preparation.json")


def _ratio(counts: Counts) -> str:
    """Bytes a token, tokens that end documents left out."""
    return f"{counts.text_bytes / max(1, counts.tokens - counts.documents):.3f}"


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
