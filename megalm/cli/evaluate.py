"""`megalm evaluate`: how well a checkpoint predicts prepared data, answers questions, does in published benchmarks."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli import show
from megalm.cli.model import CheckpointPath, Processes, Settings, in_processes
from megalm.errors import UserError

if TYPE_CHECKING:
    from megalm.launch.ranks import Process
    from megalm.train.choices import Scores
    from megalm.train.evaluate import Score


def evaluate(
    context: typer.Context,
    checkpoint: CheckpointPath,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR...", exists=True, file_okay=False, help="Prepared data.", show_default=False),
    ] = None,
    more_data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR...]", exists=True, file_okay=False, help="More, as in `--data a b`.", show_default=False
        ),
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="JSONL of context, choices, answer.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="A benchmark of lm-eval, if installed.", show_default=False),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="YAML files to take benchmarks from.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of each benchmark so many questions.", show_default=False)
    ] = None,
    nproc: Processes = None,
    settings: Settings = None,
) -> int:
    """Print loss, perplexity and bits per byte for each source; the share of questions that are answered rightly."""
    directories, files = [*(data or []), *(more_data or [])], choices or []
    if not (directories or files or tasks):
        raise UserError("nothing to evaluate: give --data DIR, --choices FILE or --task NAME")
    if not tasks and (task_folder or limit):
        raise UserError("--task-folder and --limit are about benchmarks: give --task NAME, too")

    def work(process: Process) -> None:
        from megalm.train.choices import answered, encode_questions, likelihoods, read_questions
        from megalm.train.evaluate import Score, portion, score_portion
        from megalm.train.trained import SavedModel, opened_model

        def prepare(saved: SavedModel):  # type: ignore[no-untyped-def]
            if tasks and find_spec("lm_eval") is None:
                raise UserError("--task needs lm-eval: pip install 'megalm[lm-eval]'")
            asked = [(file, read_questions(file)) for file in files]
            encoded = [encode_questions(saved.tokenizer, questions, saved.positions) for _, questions in asked]
            return [portion(saved, directory) for directory in directories], asked, encoded

        with opened_model(checkpoint, process, settings or (), prepare) as (trained, (portions, asked, encoded)):
            parts = [(part, score_portion(trained.passes, trained.saved, part)) for part in portions]
            answers = [
                (file.name, answered(questions, likelihoods(trained.passes, pairs)))
                for (file, questions), pairs in zip(asked, encoded, strict=True)
            ]
            results = []
            if tasks:
                from megalm.train.lm_eval import run_tasks

                results = list(run_tasks(trained, tasks, task_folder, limit))
        if process.rank:
            return
        rows = [_row(part.source.name, part.what, show.number(part.count), score) for part, score in parts]
        if len(parts) > 1:
            rows.append(_row("together", "", "", sum((score for _, score in parts), Score(0.0, 0, 0))))
        if rows:
            show.table(
                "prepared data", rows, ("source", "part", "sequences", "tokens", "loss", "perplexity", "bits/byte")
            )
        if answers:
            header = ("file", "questions", "acc", "acc_norm", "acc_bytes")
            show.table("multiple choice", [_answers(name, scores) for name, scores in answers], header)
        if results:
            lines = [(task, metric, _with_error(value, error)) for task, metric, value, error in results]
            show.table("lm-eval", lines, ("task", "metric", "value"))

    return in_processes(checkpoint, nproc, settings, context, work)


def _row(name: str, part: str, sequences: str, score: Score) -> tuple[str, ...]:
    ratios = (f"{score.loss:.4f}", f"{score.perplexity:.2f}", f"{score.bits_per_byte:.4f}")
    return name, part, sequences, show.number(score.tokens), *ratios


def _answers(name: str, scores: Scores) -> tuple[str, ...]:
    shares = (scores.acc, scores.acc_norm, scores.acc_bytes)
    return name, show.number(scores.questions), *(_with_error(share, scores.error(share)) for share in shares)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None or math.isnan(error) else f"{value:.4f} ± {error:.4f}"
