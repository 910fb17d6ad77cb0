"""The CPU kernels of csrc/fused_softmax, built once more with the address and undefined-behaviour sanitizers, and run
by each instruction set of this machine on memory of exactly the size that they may touch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_sanitizers import ROOT, SANITIZERS, compiler, runtime


@pytest.mark.full
def test_the_kernels_touch_nothing_but_their_rows(tmp_path: Path) -> None:
    if not (runtime("libasan.so") and runtime("libubsan.so")):
        pytest.skip(f"{compiler()} has no libraries of the sanitizers")
    folder, binary = ROOT / "csrc" / "fused_softmax", tmp_path / "exercise"
    sources = [Path(__file__).with_name("fused_softmax_exercise.cpp"), *sorted(folder.glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{folder}", *SANITIZERS.split()]
    subprocess.run([compiler(), *flags, *map(str, sources), "-o", str(binary), "-ldl"], check=True, timeout=280)
    used = set()
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([str(binary)], env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        used.add(done.stdout.strip())
    assert "portable" in used
