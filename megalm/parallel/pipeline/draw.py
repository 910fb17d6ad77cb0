"""Pictures of plans: when each rank does what, as text or through matplotlib, simulated or measured.

rank 0  F0--F1--F2--F3--f0--f1--    small letters: the rank's second (fourth, ...) chunk
rank 1  ....F0--F1--F2--F3--f0--    dots: the rank waits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import UserError
from megalm.parallel.pipeline.plan import COMPUTE, Action, Op, Placement
from megalm.parallel.pipeline.simulate import Timed

Ranks = Sequence[Sequence[Timed]]
COLOURS = {
    Op.FORWARD: ("forward", "#4c78a8", "#9ecae9"),
    Op.BACKWARD: ("backward", "#e45756", "#ffb3b0"),
    Op.INPUT_GRADIENT: ("input gradient", "#f58518", "#ffcf94"),
    Op.WEIGHT_GRADIENT: ("weight gradient", "#54a24b", "#b4dfa8"),
}
"""Name, and the colours of a rank's odd and even chunks."""


@dataclass(frozen=True)
class Chart:
    """What is drawn: one line of bars a rank."""

    title: str
    placement: Placement
    ranks: Ranks
    notes: Sequence[str]
    """Beside each rank."""

    @property
    def end(self) -> float:
        return max(rank[-1].end for rank in self.ranks if rank)

    def chunk(self, action: Action) -> int:
        """Which of its rank's stages an action belongs to, from 0."""
        return self.placement[: action.stage].count(self.placement[action.stage])


def as_text(chart: Chart, width: int = 120) -> str:
    """Letters, `width` for the whole step."""
    lines = [chart.title]
    scale = width / chart.end
    for rank, (times, note) in enumerate(zip(chart.ranks, chart.notes, strict=True)):
        line = ["."] * width
        for action, start, end in times:
            label = f"{action.op.value}{action.micro_batch}"
            label = label.lower() if chart.chunk(action) % 2 else label
            first, size = round(start * scale), max(1, round(end * scale) - round(start * scale))
            line[first : first + size] = label.ljust(size, "-")[:size]
        lines.append(f"rank {rank:<3} {''.join(line[:width])}  {note}")
    return "\n".join(lines) + "\n"


def as_picture(charts: Sequence[Chart], path: Path, kind: str) -> None:
    """Writes a `png` or `svg`, the charts one below the other on the same scale of time."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError(
            "pictures need matplotlib: pip install 'megalm[plot]', or choose an output that ends in .txt"
        ) from None
    heights = [0.42 * len(chart.ranks) + 1.0 for chart in charts]
    figure = Figure(figsize=(14, sum(heights) + 0.6), layout="constrained")
    rows = figure.subplots(len(charts), squeeze=False, height_ratios=heights)
    end = max(chart.end for chart in charts)
    points = 14 * 72 * 0.8 / end  # of the page, for a unit of time
    used = {action.op for chart in charts for rank in chart.ranks for action, _, _ in rank}
    for chart, axes in zip(charts, rows[:, 0], strict=True):
        for rank, times in enumerate(chart.ranks):
            for action, start, finish in times:
                shade = COLOURS[action.op][1 + chart.chunk(action) % 2]
                axes.barh(rank, finish - start, left=start, height=0.86, color=shade, edgecolor="white", linewidth=0.4)
                text, size = str(action.micro_batch), min(8.0, (finish - start) * points / 1.5)
                if size / max(1, len(text) - 1) >= 4:
                    size = size / max(1, len(text) - 1)
                    axes.text((start + finish) / 2, rank, text, ha="center", va="center", fontsize=size)
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set(xlim=(0, end), ylim=(len(chart.ranks) - 0.45, -0.55))
        axes.set_yticks(
            range(len(chart.ranks)), [f"rank {r}  {note}" for r, note in enumerate(chart.notes)], fontsize=8
        )
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xlabel("time")
    later = any(chart.chunk(a) % 2 for chart in charts for rank in chart.ranks for a, _, _ in rank)
    legend = [Patch(color=COLOURS[op][1], label=COLOURS[op][0]) for op in COMPUTE if op in used]
    if later:
        legend.append(Patch(color=COLOURS[Op.FORWARD][2], label="light: every second chunk of a rank"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format=kind)
