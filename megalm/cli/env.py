"""`megalm env`: what this installation computes with, one line each, for reports of mistakes and before long runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

# Packages that give more where they are installed; setup.py's extras say what for.
OPTIONAL = ("deepspeed", "gigatoken", "pyarrow", "tiktoken", "rensa", "py3langid", "matplotlib", "transformers")


def env() -> None:
    """Show Python, torch, devices, native kernels and optional packages."""
    for name, finding in lines():
        print(f"{name:<20}{finding}")


def lines() -> list[tuple[str, str]]:
    """Name and finding of each line."""
    import torch

    import megalm

    return [
        ("megalm", f"{megalm.__version__}, {os.path.dirname(megalm.__file__)}"),
        ("python", f"{platform.python_version()}, {platform.system()} on {platform.machine()}"),
        ("torch", torch.__version__),
        *_devices(),
        *_kernels(),
        *((name, _package(name)) for name in OPTIONAL),
        ("apex", _apex()),
    ]


def _devices() -> list[tuple[str, str]]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = [(f"gpu {i}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}") for i, gpu in enumerate(gpus)]
    return [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"), *(found or [("gpu", "none")])]


def _kernels() -> list[tuple[str, str]]:
    import torch

    from megalm.ops import native
    from megalm.ops.attention import kernels_in_use

    has_order = _is_found("megalm._indexed_dataset") and _is_found("megalm._order")
    on_cpu = f"native, {native.instruction_set()}" if native.library("cpu") else "not built: torch computes"
    on_gpu = "native" if torch.cuda.is_available() else "built, but there is no GPU"
    if native.library("cuda") is None:
        on_gpu = "not built: torch computes"
    return [
        ("data kernels", "built" if has_order else "not built: no data can be read"),
        ("softmax on the CPU", on_cpu),
        ("softmax on a GPU", on_gpu),
        ("attention on a CPU", kernels_in_use(torch.device("cpu"))),
        *([("attention on a GPU", kernels_in_use(torch.device("cuda")))] if torch.cuda.device_count() else []),
    ]


def _is_found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _package(name: str) -> str:
    if not _is_found(name):
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "found, of unknown version"


def _apex() -> str:
    """NVIDIA's is told by its compiled module: PyPI's package of this name is another."""
    if _is_found("amp_C"):
        return "found (amp_C); not used: torch's fused AdamW computes the same"
    return "not installed" + (", but another package of its name is" if _is_found("apex") else "")
