"""`megalm doctor`: what each rank of a run finds where it is, side by side, before the run costs anything.

    each rank     versions, device, attention kernels, free memory and disk, its clock, a matrix product; whether it
                  sees what rank 0 writes to the run's directory
    each group    an all-reduce of 8 bytes (latency) and a large one (bandwidth), all groups of an axis at the same
                  time, as in a run
    rank 0        tables, with a remark on what differs from most ranks or is much slower than the middle one

Bandwidth is what a rank sends, and receives, in a ring: 2 (n - 1) / n of the bytes.
"""

from __future__ import annotations

import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import megalm
from megalm.checkpoint.ranks import together
from megalm.config import Config, to_yaml
from megalm.errors import UserError
from megalm.launch.ranks import Process
from megalm.launch.world import TIMEOUT, World
from megalm.ops.attention import kernels_in_use
from megalm.parallel.mesh import Axis, Layout, Mesh, build_mesh
from megalm.train.build import layout_of
from megalm.train.device import DTYPES, free_memory, measured_matmul, pick_device

LARGE = {"cpu": 16 << 20, "cuda": 256 << 20}  # bytes, enough for full bandwidth
SLOW = 0.7  # of the middle one's speed
LATE = 0.5  # seconds between clocks
SHOWN = 64  # ranks, or groups, that are shown although nothing is to be said of them
ALIKE = ("versions", "device", "attention")


def examine(config: Config | None, process: Process) -> int:
    """Runs on every rank; rank 0 prints. `config` gives the layout, the device and the run's directory; without one all
    ranks are data ranks. Returns 1 if ranks differ in what a run needs to be the same, else 0, fast or slow."""
    world = World(process)

    def prepare() -> torch.device:
        return pick_device(config.run.device if config else "auto", process.local_rank)

    def facts(device: torch.device) -> dict[str, str]:
        return {"config": to_yaml(config) if config else "", "kind of device": device.type}

    device = world.agree(prepare, facts)
    layout = layout_of(config.parallel) if config else Layout(data_shard=process.size)
    with world.joined(device, TIMEOUT):
        mesh = Mesh(device=device)
        if layout.size > 1:
            mesh = build_mesh(layout, device, timedelta(seconds=TIMEOUT))
        directory = _existing(Path(config.run.dir if config else "."))
        seen = _sees(directory, mesh)
        finding = {
            "host": socket.gethostname(),
            "versions": f"megalm {megalm.__version__}, torch {torch.__version__}, python {platform.python_version()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "attention": kernels_in_use(device),
            "memory": free_memory(device),
            "disk": shutil.disk_usage(directory).free,
            "sees": seen,
            "clock": _clock(mesh),
            "flops": measured_matmul(device, DTYPES[config.precision.compute if config else "float32"]),
            "groups": [*_groups(mesh)],
        }
        faults = together(mesh.world.group, lambda: finding, lambda findings: _report(findings, directory))
    return int(faults > 0)


def _existing(directory: Path) -> Path:
    """`directory`, or the nearest above it that exists."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def _sees(directory: Path, mesh: Mesh) -> bool:
    """Whether this rank sees a file that rank 0 has written to `directory`."""

    def write(_: Any) -> str:
        path = directory / f".megalm-doctor-{uuid4().hex}"
        try:
            path.touch()
        except OSError as error:
            raise UserError(f"{directory}: rank 0 cannot write there: {error.strerror}") from error
        return str(path)

    path = Path(together(mesh.world.group, judge=write))
    try:
        return bool(together(mesh.world.group, lambda: path.exists(), lambda seen: seen)[mesh.rank])
    finally:
        if mesh.rank == 0:
            path.unlink(missing_ok=True)


def _clock(mesh: Mesh) -> float:
    """Seconds by which this rank's clock is ahead of rank 0's: read when a collective ends, which it does everywhere at
    nearly the same time, in the middle of several tries."""

    def read() -> float:
        _all_reduce(mesh.world, torch.zeros(1, device=mesh.device))
        return time.time()

    mine = [read() for _ in range(9)]
    first = together(mesh.world.group, lambda: mine, lambda read: read[0])
    return median(ours - theirs for ours, theirs in zip(mine, first, strict=True))


def _groups(mesh: Mesh) -> Iterator[dict[str, Any]]:
    """Latency and bandwidth of this rank's groups, of each on its first rank alone."""
    axes = [("tensor", mesh.tensor), ("data", mesh.data), ("pipeline", mesh.pipeline), ("all ranks", mesh.world)]
    timed: list[Axis] = []
    for _, axis in axes:
        if axis.size == 1 or any(axis is other for other in timed):
            continue
        timed.append(axis)
        names = " = ".join(other for other, same in axes if same is axis)
        small = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        large = torch.zeros(LARGE[mesh.device.type] // 4, device=mesh.device)
        for tensor in (small, large):  # connections are made at the first
            _all_reduce(axis, tensor)
        _all_reduce(mesh.world, small)
        latency = median(_all_reduce(axis, small) for _ in range(20))
        seconds = min(_all_reduce(axis, large) for _ in range(3))
        if axis.rank == 0:
            sent = 2 * (axis.size - 1) / axis.size * large.nbytes
            yield {"axis": names, "ranks": axis.ranks, "latency": latency, "bandwidth": sent / seconds}


def _all_reduce(axis: Axis, tensor: torch.Tensor) -> float:
    """Sums `tensor` over the axis; returns how long it took."""
    begun = time.perf_counter()
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    tensor[:1].cpu()  # waits
    return time.perf_counter() - begun


def _report(findings: Sequence[dict[str, Any]], directory: Path) -> int:
    """Prints what ranks found. Returns how many differ from the others in what a run needs to be the same."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150
    hosts = {finding["host"] for finding in findings}
    console.print(f"ranks {len(findings)}, hosts {len(hosts)}: {', '.join(_common(findings).values())}", soft_wrap=True)
    rows = [
        (
            str(rank),
            found["host"],
            f"{found['flops'] / 1e9:,.0f} GFLOP/s",
            f"{found['memory'] / 2**30:,.1f} GiB",
            f"{found['disk'] / 2**30:,.1f} GiB",
            f"{found['clock']:+.3f} s",
        )
        for rank, found in enumerate(findings)
    ]
    faults = [differences(found, findings, directory) for found in findings]
    remarks = ["; ".join(fault + slow(found, findings)) for fault, found in zip(faults, findings, strict=True)]
    _print(console, ("rank", "host", "matrix product", "free memory", "free disk", "clock"), rows, remarks)
    groups = [group for found in findings for group in found["groups"]]
    if groups:
        order = list(dict.fromkeys(group["axis"] for group in groups))
        groups = sorted(groups, key=lambda group: order.index(group["axis"]))
        lines = [
            (
                group["axis"],
                _ranks(group["ranks"]),
                f"{group['latency'] * 1e6:,.0f} µs",
                f"{group['bandwidth'] / 1e9:,.2f} GB/s",
            )
            for group in groups
        ]
        remarks = [slow_group(group, groups) for group in groups]
        _print(console, ("group", "ranks", "latency", "bandwidth"), lines, remarks)
    return sum(map(bool, faults))


def _common(findings: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What most ranks have of that which should be the same on all."""
    return {name: Counter(found[name] for found in findings).most_common(1)[0][0] for name in ALIKE}


def differences(found: dict[str, Any], findings: Sequence[dict[str, Any]], directory: Path) -> list[str]:
    """In what a rank is other than a run needs it to be."""
    common = _common(findings)
    different = [f"{found[name]} instead of {common[name]}" for name in ALIKE if found[name] != common[name]]
    if not found["sees"]:
        different.append(f"does not see what rank 0 writes to {directory}")
    if abs(found["clock"]) > LATE:
        different.append("its clock is not rank 0's")
    return different


def slow(found: dict[str, Any], findings: Sequence[dict[str, Any]]) -> list[str]:
    """In what a rank has much less than the middle one."""
    words = {"flops": "slow", "memory": "little memory is free"}
    return [word for name, word in words.items() if found[name] < SLOW * median(other[name] for other in findings)]


def slow_group(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> str:
    """Whether a group is much slower than the middle one of its axis."""
    others = [other for other in groups if other["axis"] == group["axis"]]
    narrow = group["bandwidth"] < SLOW * median(other["bandwidth"] for other in others)
    late = SLOW * group["latency"] > median(other["latency"] for other in others)
    return "slow" if narrow or late else ""


def _print(console: Console, titles: Sequence[str], rows: Sequence[tuple[str, ...]], remarks: Sequence[str]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title in ("host", "group", "ranks") else "right")
    table.add_column("remark")
    shown = [place for place, remark in enumerate(remarks) if remark or len(rows) <= SHOWN]
    for place in shown:
        table.add_row(*rows[place], remarks[place], style="yellow" if remarks[place] else "")
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"and {len(rows) - len(shown):,} more without a remark")


def _ranks(ranks: Sequence[int]) -> str:
    """`0, 2, 4, 6` or, if there are many, `0, 8, ..., 504`."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
