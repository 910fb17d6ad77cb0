"""`megalm data dedup` and `megalm data filter`: text with less repetition and better quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalm.cli.data import Inputs, MaxSkipped, MoreInputs, Overwrite, TextKey, Workers

if TYPE_CHECKING:
    from megalm.data.curation.parts import Counts

Output = Annotated[Path, typer.Option(metavar="DIR", help="The directory to write: .jsonl files and a report.json.")]


def dedup(
    inputs: Inputs,
    output: Output,
    more_inputs: MoreInputs = None,
    kind: Annotated[
        str, typer.Option(metavar="exact|minhash", help="Equal texts, or with minhash nearly equal ones too.")
    ] = "minhash",
    threshold: Annotated[float, typer.Option(help="Jaccard similarity from which on texts are nearly equal.")] = 0.8,
    ngram: Annotated[int, typer.Option(help="Similarity is of the sets of runs of so many words.")] = 5,
    listed: Annotated[int, typer.Option("--list", help="Removed documents to list in the report.")] = 1000,
    workers: Workers = None,
    text_key: TextKey = "text",
    max_skipped: MaxSkipped = None,
    overwrite: Overwrite = False,
) -> None:
    """Remove documents that repeat an earlier one, word for word or nearly."""
    from megalm.cli import show
    from megalm.cli.data import num_cpus
    from megalm.data.counts import SkipLimit
    from megalm.data.curation.dedup import dedup

    watch = show.Stopwatch()
    with show.progress("Reading") as update:
        report = dedup(
            [*inputs, *(more_inputs or [])],
            output,
            kind=kind,
            threshold=threshold,
            ngram=ngram,
            listed=listed,
            workers=workers if workers is not None else num_cpus(),
            text_key=text_key,
            limit=SkipLimit() if max_skipped is None else SkipLimit.parse(max_skipped),
            overwrite=overwrite,
            on_progress=lambda what, done, total: update(done, total, what.lower()),
        )
    rows = [
        ("removed, equal to another", show.number(report.exact)),
        *([("removed, nearly equal to another", show.number(report.near))] if kind == "minhash" else []),
    ]
    _show(output, report.counts, rows, report.faults, watch.seconds)
    for duplicate in report.duplicates[:3]:
        line = f"removed {duplicate.document}: repeats {duplicate.repeats}, similarity {duplicate.similarity:.2f}"
        typer.echo(show.printable(line))
    if report.duplicates:
        typer.echo(f"{show.number(len(report.duplicates))} are listed in {output / 'report.json'}")


def filter_(
    inputs: Inputs,
    output: Output,
    more_inputs: MoreInputs = None,
    rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with a section a rule; options go over it.", show_default=False),
    ] = None,
    language: Annotated[
        str | None, typer.Option(metavar="en,de,...", help="Languages to keep, as ISO 639 codes.", show_default=False)
    ] = None,
    min_confidence: Annotated[
        float | None, typer.Option(help="How sure the language has to be; 0.5 if not given.", show_default=False)
    ] = None,
    min_characters: Annotated[int | None, typer.Option(help="Remove shorter documents.", show_default=False)] = None,
    max_characters: Annotated[int | None, typer.Option(help="Remove longer ones.", show_default=False)] = None,
    min_words: Annotated[int | None, typer.Option(help="Remove documents of fewer words.", show_default=False)] = None,
    max_words: Annotated[int | None, typer.Option(help="Remove those of more.", show_default=False)] = None,
    gopher_quality: Annotated[
        bool, typer.Option("--gopher-quality", help="Gopher's rules on words and lines.")
    ] = False,
    gopher_repetition: Annotated[
        bool, typer.Option("--gopher-repetition", help="Gopher's rules on repeated lines, paragraphs and n-grams.")
    ] = False,
    c4: Annotated[bool, typer.Option("--c4", help="C4's rules for whole pages.")] = False,
    fineweb: Annotated[bool, typer.Option("--fineweb", help="FineWeb's rules on lines.")] = False,
    decontaminate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Evaluation data: what shares 13 words with it goes. Repeatable.", show_default=False
        ),
    ] = None,
    workers: Workers = None,
    text_key: TextKey = "text",
    max_skipped: MaxSkipped = None,
    overwrite: Overwrite = False,
) -> None:
    """Remove documents by language, length, quality, repetition, or overlap with evaluation data."""
    from megalm.cli import show
    from megalm.cli.data import num_cpus
    from megalm.data.counts import SkipLimit
    from megalm.data.curation.filters import filter_documents
    from megalm.data.curation.rules import load_rules

    lengths = {
        "min_characters": min_characters,
        "max_characters": max_characters,
        "min_words": min_words,
        "max_words": max_words,
    }
    languages = {"keep": language.split(",") if language is not None else None, "min_confidence": min_confidence}
    given: dict[str, dict[str, Any]] = {
        "length": _set(lengths),
        "language": _set(languages),
        "decontaminate": _set({"files": [str(path) for path in decontaminate] if decontaminate else None}),
    }
    given = {name: section for name, section in given.items() if section}
    switches = {"gopher_quality": gopher_quality, "gopher_repetition": gopher_repetition, "c4": c4, "fineweb": fineweb}
    given |= {name: {} for name, on in switches.items() if on}
    watch = show.Stopwatch()
    with show.progress("Filtering") as update:
        report = filter_documents(
            [*inputs, *(more_inputs or [])],
            output,
            load_rules(rules, given),
            workers=workers if workers is not None else num_cpus(),
            text_key=text_key,
            limit=SkipLimit() if max_skipped is None else SkipLimit.parse(max_skipped),
            overwrite=overwrite,
            on_progress=lambda what, done, total: update(done, total, ""),
        )
    rows = []
    for name, rule in report.rules.items():
        rows.append((f"removed by {name}", show.number(rule.documents)))
        rows += [(f"    {reason}", show.number(count)) for reason, count in rule.reasons.most_common(5)]
    _show(output, report.counts, rows, report.faults, watch.seconds)
    for name, rule in report.rules.items():
        for example in rule.examples[:1]:
            typer.echo(show.printable(f"{name} removed {example.document}: {example.why}"))


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are given."""
    return {name: value for name, value in options.items() if value is not None}


def _show(output: Path, counts: Counts, rows: Sequence[tuple[str, str]], faults: list[str], seconds: float) -> None:
    """The table of what was removed, and the first faulty records."""
    from megalm.cli import show
    from megalm.cli.data import show_faults
    from megalm.data.sources import EMPTY

    share = counts.kept / max(1, counts.documents)
    show.table(
        f"Wrote {output}",
        [
            ("documents", show.number(counts.documents)),
            ("text", show.size(counts.text_bytes)),
            *rows,
            ("kept", f"{show.number(counts.kept)} ({share:.1%})"),
            ("text kept", show.size(counts.kept_bytes)),
            *((f"skipped, {reason}", show.number(count)) for reason, count in sorted(counts.skipped.items())),
            ("time", f"{seconds:.1f} s, {show.size(counts.text_bytes / seconds)}/s"),
        ],
    )
    show_faults(faults, sum(count for reason, count in counts.skipped.items() if reason != EMPTY))
