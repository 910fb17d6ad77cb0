"""What commands show: progress bars on a terminal's standard error, tables and numbers on standard output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from unicodedata import category


def number(value: int) -> str:
    """1234567 -> 1,234,567"""
    return f"{value:,}"


def size(num_bytes: float) -> str:
    """1234567 -> 1.2 MB"""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"


def printable(text: str) -> str:
    """`text` with what would steer a terminal spelled out; line ends, tabs and all kinds of spaces stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else ascii(c)[1:-1] for c in text)


def table(title: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ("", "")) -> None:
    """Prints columns, all but the first aligned to the right; the header is shown if it says anything."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left", title_style="bold", show_header=any(header), box=None)
    grid.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:  # nothing is cut to a width that a file does not have
        console.width = 1000
    console.print(grid)


@contextmanager
def progress(description: str) -> Iterator[Callable[[float, float, str], None]]:
    """A bar on standard error while it lasts, if that is a terminal; yields `update(done, total, what more to say)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console(stderr=True)
    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", table_column=whole),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),  # gives way to the words where there is no room
        TaskProgressColumn(table_column=whole),
        TextColumn("{task.fields[more]}", table_column=whole),
        TimeRemainingColumn(compact=True, table_column=whole),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, expand=True) as bars:
        task = bars.add_task(description, total=None, more="")
        is_first = True

        def update(done: float, total: float, more: str) -> None:
            nonlocal is_first
            if is_first:  # what was done before says nothing of how fast this goes
                bars.reset(task, completed=int(done), total=total, more=more)
                is_first = False
            bars.update(task, completed=done, total=total, more=more)

        yield update


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)
