from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "profile_communication.py"


def event(name: str, start: float, end: float, device: str = "CPU") -> SimpleNamespace:
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=kind)


CPU = [
    event("gloo:all_gather", 0, 1000),  # half of it is waited for
    event("_c10d_functional::wait_tensor", 500, 1000),
    event("gloo:all_gather", 2000, 3000),  # none of it
    event("aten::mm", 0, 4000),
]
GPU = [
    event("ncclDevKernel_AllGather(args)", 0, 1000, "CUDA"),
    event("gemm", 0, 300, "CUDA"),
    event("softmax", 200, 500, "CUDA"),  # overlaps: counts once
    event("ncclDevKernel_AllGather(args)", 2000, 3000, "CUDA"),
    event("gemm", 1500, 3500, "CUDA"),
    event("gloo:all_gather", 5000, 9000),
]


@pytest.mark.parametrize(("events", "cuda"), [(CPU, False), (GPU, True)])
def test_what_is_exposed_of_each_collective_is_told(events: list[SimpleNamespace], cuda: bool) -> None:
    spec = importlib.util.spec_from_file_location("profile_communication", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    first, total = tool.report(SimpleNamespace(events=lambda: events), 1, cuda).splitlines()
    name = "ncclDevKernel_AllGather" if cuda else "gloo:all_gather"
    assert first.split() == [name, *["2.0", "a", "step", "2.00", "ms", "blocking", "1.0"]]
    assert total.split() == ["all", *["2.0", "a", "step", "2.00", "ms", "blocking", "1.0", "hidden", "75%"]]
