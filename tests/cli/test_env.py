from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torch

import megalm
from megalm.cli import main
from megalm.ops import cpu_attention, native


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `megalm env` prints: finding by name."""
    assert main(["env"]) == 0
    return {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}


def finding(monkeypatch: pytest.MonkeyPatch, **modules: bool) -> None:
    """Pretends that modules are there, or are not."""
    real: Callable[[str], ModuleSpec | None] = importlib.util.find_spec

    def find_spec(name: str) -> ModuleSpec | None:
        if name not in modules:
            return real(name)
        return ModuleSpec(name, None) if modules[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_versions_and_devices_are_this_machines(capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(capsys)
    assert found["megalm"].startswith(f"{megalm.__version__}, ")
    assert found["python"].startswith(f"{platform.python_version()}, ")
    assert found["torch"] == torch.__version__
    assert found["cpu"].endswith(f"{torch.get_num_threads()} threads")
    assert ("gpu" in found) == (torch.cuda.device_count() == 0)


def test_kernels_are_those_that_are_used(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(capsys)["data kernels"] == "built"
    monkeypatch.setattr(native, "library", lambda kind: None)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    found = shown(capsys)
    assert found["softmax on the CPU"] == found["softmax on a GPU"] == "not built: torch computes"
    monkeypatch.setattr(native, "library", lambda kind: ctypes.CDLL(None))
    for has_gpu, wanted in ((False, "built, but there is no GPU"), (True, "native")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_gpu: answer)
        found = shown(capsys)
        assert found["softmax on the CPU"] == "native, avx2"
        assert found["softmax on a GPU"] == wanted


def test_optional_packages_are_found_or_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"version of {name}")
    finding(monkeypatch, deepspeed=False, rensa=True)
    found = shown(capsys)
    assert found["deepspeed"] == "not installed"
    assert found["rensa"] == "version of rensa"


def test_nvidias_apex_is_told_by_its_module_and_not_by_its_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for modules, wanted in (
        ({"amp_C": False, "apex": False}, "not installed"),
        ({"amp_C": False, "apex": True}, "not installed, but another package of its name is"),
        ({"amp_C": True, "apex": True}, "found (amp_C)"),
    ):
        with monkeypatch.context() as patch:
            finding(patch, **modules)
            assert shown(capsys)["apex"].startswith(wanted)


def test_attention_is_what_the_processor_has_kernels_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels, wanted in (
        ({}, "float32 matrix products, bfloat16 matrix products"),
        ({torch.bfloat16: ("amx", "avx512_bf16")}, "float32 matrix products, bfloat16 amx"),
    ):
        monkeypatch.setattr(cpu_attention, "KERNELS", kernels)
        assert shown(capsys)["attention on a CPU"] == wanted
