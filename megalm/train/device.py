"""The device to compute on: which, how fast at most, how much memory is in use."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time

import torch
from torch import Tensor

from megalm.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Dense bfloat16 matrix peaks in FLOP/s, from the makers' data sheets; the longest name that fits counts.
GPU_PEAKS = {
    "V100": 125e12,  # float16: it has no bfloat16 units
    "A10": 125e12,
    "A100": 312e12,
    "A800": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI250X": 191.5e12,  # one of its two dies
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
}
SQUARE = {"cpu": 1536, "cuda": 8192}  # side of the measured product: large enough for full speed, and still quick


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of `run.device`, where `auto` is a GPU if there is one: each process of a machine has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError("run.device=cuda, but torch finds no GPU: use cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"run.device={name}: process {local_rank} of this machine has no GPU, there are "
            f"{torch.cuda.device_count()}: start as many processes"
        )
    return torch.device(name, local_rank)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s at most: from the table for a known GPU in bfloat16, else what a square matrix product reaches."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (peak := gpu_peak(torch.cuda.get_device_name(device))):
        return peak
    return measured_matmul(device, dtype)


def gpu_peak(name: str) -> float | None:
    """The table's figure for the GPU that calls itself `name`: all words of the entry are words of the name."""
    words = set(re.split(r"[ -]", name))
    known = [gpu for gpu in GPU_PEAKS if set(gpu.split()) <= words]
    return GPU_PEAKS[max(known, key=len)] if known else None


def measured_matmul(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the best of several square matrix products, after a warm-up."""
    side = SQUARE[device.type]
    a = torch.randn(side, side, dtype=dtype, device=device)
    _wait_for((a @ a).sum())
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        _wait_for((a @ a).sum())
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait_for(result: Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Bytes of memory that a new process could have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return total_memory(device)


def memory_bytes(device: torch.device) -> int:
    """Peak memory: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
