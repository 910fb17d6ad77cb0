"""How the native sources for CPUs compile: with clang as with GCC, and so that no file's instructions leave it."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
WIDE = ["attention/avx512", "attention/avx512_bf16", "attention/amx", "fused_softmax/avx2", "fused_softmax/avx512"]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setenv("MEGALM_CUDA_ARCHS", "")
    return runpy.run_path(str(ROOT / "setup.py"))


def flags_of(build: dict[str, Any], source: str) -> list[str]:
    extension = setuptools.Extension("any", [source], extra_compile_args=["-ffp-contract=fast"])
    return [*build["for_host"](extension)[1].split(), *build["FILE_FLAGS"].get(source, "").split()]


def test_clang_takes_them(build: dict[str, Any]) -> None:
    clang = shutil.which("clang++")
    if clang is None or build["platform"].machine() != "x86_64":
        pytest.skip("needs clang++ on x86-64")
    sources = [*ROOT.glob("csrc/attention/*.cpp"), *ROOT.glob("csrc/fused_softmax/*.cpp")]
    for source in sorted(source for source in sources if source.name != "module.cpp"):  # that is pybind11's
        flags = flags_of(build, str(source.relative_to(ROOT)))
        command = [clang, *flags, "-Wno-unknown-warning-option", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


def test_what_is_compiled_for_some_processors_is_no_other_files_copy(build: dict[str, Any], tmp_path: Path) -> None:
    """The linker keeps one copy of a weak function for all files: that of a file for AVX-512 would end the process on
    a processor without."""
    if shutil.which("nm") is None or build["platform"].machine() != "x86_64":
        pytest.skip("needs nm on x86-64")
    objects = [
        path for name in WIDE for path in ROOT.glob(f"build/temp*/megalm._{name.split('/')[0]}*/{Path(name).name}.o")
    ]
    if not objects:
        source = "csrc/attention/avx512.cpp"
        objects = [tmp_path / "avx512.o"]
        command = [build["os"].environ.get("CXX", "c++"), *flags_of(build, source), "-c", source, "-o", str(objects[0])]
        subprocess.run(command, cwd=ROOT, timeout=250, check=True)
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert any(" T " in line or " R " in line or " D " in line for line in symbols)
        assert [line for line in symbols if " W " in line or " u " in line] == []
