"""`megalm plan`: what a layout will do, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli.show import size, table
from megalm.errors import UserError, nearest

if TYPE_CHECKING:
    from megalm.parallel.pipeline.draw import Chart
    from megalm.parallel.pipeline.plan import Placement, Schedule
    from megalm.parallel.pipeline.simulate import Costs, Simulation

MOST_ACTIONS, MOST_OF_AUTO = 2_000_000, 100_000  # some minutes; `auto` makes a dozen orders

app = typer.Typer(help="Know before you launch.", no_args_is_help=True)


@app.command()
def schedule(
    context: typer.Context,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step on a data rank.")] = 16,
    schedule: Annotated[str, typer.Option(metavar="NAME", help="As in parallel.pipeline.schedule.")] = "1f1b",
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Stages a rank; else 1, or 2 where needed.", show_default=False)
    ] = None,
    costs: Annotated[
        str,
        typer.Option(
            metavar="F,I,W,COMM", help="Times of a rank's forward, input and weight gradient, and of a message."
        ),
    ] = "1,1,1,0",
    memory_cap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Micro-batches of which a rank may hold all its layers' activations at once.",
            show_default=False,
        ),
    ] = None,
    message_size: Annotated[int, typer.Option(min=0, help="Bytes that one stage sends another at once.")] = 0,
    from_run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            exists=True,
            file_okay=False,
            help="Take layout and costs from what a run with log.timeline=true recorded.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg or .txt.", show_default=False)
    ] = None,
) -> None:
    """Simulate a pipeline's step and draw it."""
    if output is not None and output.suffix not in (".png", ".svg", ".txt"):
        raise UserError(f"--output={output}: ends in none of .png, .svg and .txt: choose one of them")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no directory {output.parent}: make it first")
    if memory_cap is not None:
        memory_cap *= 1 + 1e-9  # shares of a rank, such as thirds, do not add up exactly
    if from_run is not None:
        for option in ("pipeline", "micro_batches", "schedule", "chunks", "costs", "message_size"):
            source = context.get_parameter_source(option)
            if source is not None and source.name == "COMMANDLINE":
                raise UserError(
                    f"--{option.replace('_', '-')} has no meaning with --from-run, which has recorded it: leave it out"
                )
        _measured(from_run, memory_cap, output)
    else:
        _simulated(pipeline, micro_batches, schedule, chunks, costs, memory_cap, message_size, output)


def _simulated(
    pipeline: int,
    micro_batches: int,
    name: str,
    chunks: int | None,
    times: str,
    memory_cap: float | None,
    message_size: int,
    output: Path | None,
) -> None:
    from megalm.parallel.pipeline.plan import placement_of
    from megalm.parallel.pipeline.planner import plan_schedule
    from megalm.parallel.pipeline.simulate import simulate

    known, chunks = _schedule(name, pipeline, chunks)
    most = MOST_OF_AUTO if known == "auto" else MOST_ACTIONS
    if 3 * pipeline * chunks * micro_batches > most:
        raise UserError(
            f"--pipeline={pipeline}, --micro-batches={micro_batches}: a step of more than {most:,} actions with "
            f"--schedule={known}: choose less"
        )
    placement = placement_of(known, pipeline, chunks)
    costs = _costs(times, placement)
    simulation = simulate(plan_schedule(known, pipeline, chunks, micro_batches, costs, memory_cap), placement, costs)
    _table("", [(known, simulation)])
    print(f"\n{simulation.messages:,} messages between ranks", end="")
    print(f", {size(simulation.messages * message_size)}\n" if message_size else "\n")
    title = f"{known}, {micro_batches} micro-batches: bubble {simulation.bubble:.4g}, floor {simulation.floor:.4g}"
    _draw([_chart(title, placement, simulation)], output)


def _measured(run: Path, memory_cap: float | None, output: Path | None) -> None:
    from megalm.parallel.pipeline.draw import Chart
    from megalm.parallel.pipeline.planner import plan_schedule
    from megalm.parallel.pipeline.schedules import templates
    from megalm.parallel.pipeline.search import search
    from megalm.parallel.pipeline.simulate import simulate
    from megalm.parallel.pipeline.timeline import TIMELINE, read_timeline

    timeline = read_timeline(run / TIMELINE)
    placement, micro_batches, costs = timeline.placement, timeline.micro_batches, timeline.costs()
    simulation = simulate([[timed.action for timed in rank] for rank in timeline.ranks], placement, costs)
    ranks, chunks = max(placement) + 1, placement.count(0)
    rows = []
    for name in templates(placement):
        found = simulate(plan_schedule(name, ranks, chunks, micro_batches, costs), placement, costs)
        over = memory_cap is not None and max(found.peaks) > memory_cap
        rows.append((f"{name}, over the cap" if over else name, found))
    best = search(placement, micro_batches, costs, memory_cap)
    rows.append(("auto", simulate(best, placement, costs)))
    _table("Simulated with the measured costs, in seconds", [(f"{timeline.schedule}, as it ran", simulation), *rows])
    real = timeline.seconds
    difference = f"{abs(real / simulation.makespan - 1):.1%} {'more' if real > simulation.makespan else 'less'}"
    print(f"\nThe step took {real:.4g} s, {difference} than simulated; {size(timeline.bytes)} sent between ranks.\n")
    charts = [
        _chart(f"{timeline.schedule}, simulated: {simulation.makespan:.4g} s", placement, simulation),
        Chart(f"as it ran: {real:.4g} s, {difference}", placement, timeline.ranks, [""] * len(timeline.ranks)),
    ]
    _draw(charts, output)


def _schedule(name: str, pipeline: int, chunks: int | None) -> tuple[Schedule, int]:
    """A schedule's name and its chunks, checked."""
    from typing import get_args

    from megalm.config.rules import CHUNKS, pipeline_chunks
    from megalm.config.sections import Pipeline
    from megalm.parallel.pipeline.plan import Schedule

    if name not in (names := get_args(Schedule)):
        raise UserError(f"--schedule={name} is no schedule.{nearest(name, names)} They are {', '.join(names)}")
    given = Pipeline.model_validate({"size": pipeline, "schedule": name, "chunks": chunks})
    chunks = pipeline_chunks(given)
    if pipeline > 1 and chunks not in (allowed := CHUNKS.get(name, (chunks,))):
        raise UserError(f"--chunks={chunks} does not fit --schedule={name}, which has {allowed[0]}: leave it out")
    if pipeline == 1 and chunks > 1:
        raise UserError(f"--chunks={chunks} has no meaning with --pipeline=1: leave it out")
    return given.schedule, chunks


def _costs(text: str, placement: Placement) -> Costs:
    """`F,I,W,COMM` of a rank as costs of its stages."""
    from megalm.parallel.pipeline.simulate import Costs

    chunks = len(placement) // (max(placement) + 1)
    try:
        numbers = forward, input_gradient, weight_gradient, latency = tuple(map(float, text.split(",")))
        least, most = min(forward, input_gradient, weight_gradient), max(numbers)
        if not (isfinite(sum(numbers)) and least >= 1e-6 * most and least > 0 <= latency):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--costs={text}: give four numbers, F,I,W,COMM, such as 1,1.2,0.8,0.05; the first three above 0, "
            "and none a million times another"
        ) from None
    shares = forward / chunks, input_gradient / chunks, weight_gradient / chunks
    costs = Costs.uniform(len(placement), *shares, latency=latency)
    return replace(costs, activation=(1 / chunks,) * len(placement))


def _table(title: str, rows: list[tuple[str, Simulation]]) -> None:
    header = ("schedule", "step", "bubble", "of the work", "floor", "micro-batches held at most, by rank")
    table(
        title,
        [
            (
                name,
                f"{s.makespan:.4g}",
                f"{s.bubble:.4g}",
                f"{s.bubble / max(s.work):.1%}",
                f"{s.floor:.4g}",
                " ".join(f"{peak:g}" for peak in s.peaks),
            )
            for name, s in rows
        ],
        header,
    )


def _chart(title: str, placement: Placement, simulation: Simulation) -> Chart:
    from megalm.parallel.pipeline.draw import Chart

    return Chart(title, placement, simulation.ranks, [f"peak {peak:g}" for peak in simulation.peaks])


def _draw(charts: list[Chart], output: Path | None) -> None:
    from megalm.files import replacing, write_atomic
    from megalm.parallel.pipeline.draw import as_picture, as_text

    if output is None:
        print(*map(as_text, charts), sep="\n", end="")
    elif output.suffix == ".txt":
        write_atomic(output, "\n".join(map(as_text, charts)).encode())
    else:
        with replacing(output) as temporary:
            as_picture(charts, temporary, output.suffix[1:])
