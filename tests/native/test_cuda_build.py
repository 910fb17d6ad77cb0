"""How setup.py builds the CUDA kernels, and what nvcc says of them. No test here needs a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_kernels import SOURCES, nvcc

from megalm.ops import native

ROOT = Path(__file__).parents[2]
NO_DRIVER, NO_DEVICE = 35, 100


def setup(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """With the environment so changed; None: not set."""
    changed = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def compiler() -> str:
    """nvcc, or the test is skipped."""
    found = nvcc()
    if found is None:
        pytest.skip("needs nvcc")
    return found


def assert_no_kernel_spills(report: str, kernels: int) -> None:
    """Of what `-Xptxas -v` says."""
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", report)]
    assert len(names) == len(spills) == len(registers) == kernels
    assert [name for name, spilt in zip(names, spills, strict=True) if spilt != ("0", "0")] == []
    print(f"{kernels} kernels, {min(registers)} to {max(registers)} registers a thread, no spills")


def test_a_build_without_cuda_says_so_in_one_line() -> None:
    done = setup("--name", MEGALM_CUDA_ARCHS="")
    assert done.returncode == 0
    reason = "MEGALM_CUDA_ARCHS is empty" if nvcc() else "no nvcc: set CUDA_HOME"
    assert done.stdout.splitlines() == [f"megalm: built without CUDA kernels ({reason})", "megalm"]


def test_architectures_that_are_none_are_refused() -> None:
    compiler()
    done = setup("--name", MEGALM_CUDA_ARCHS="hopper")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("MEGALM_CUDA_ARCHS=hopper: give compute capabilities such as 80;90")


def test_architectures_that_nvcc_does_not_compile_for_are_refused_and_not_taken_from_a_gpu(tmp_path: Path) -> None:
    compiler()
    done = setup("--name", MEGALM_CUDA_ARCHS="20;80")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("MEGALM_CUDA_ARCHS=20;80: this nvcc compiles for ")
    gpu = tmp_path / "nvidia-smi"
    gpu.write_text("#!/bin/sh\necho 2.0\n")
    gpu.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = setup("--name", MEGALM_CUDA_ARCHS=None, PATH=path)
    assert done.returncode == 0, done.stderr
    reason = "nvcc does not compile for this machine's GPUs"
    assert done.stdout.splitlines() == [f"megalm: built without CUDA kernels ({reason})", "megalm"]


def test_an_installed_library_loads_without_a_gpu_and_says_that_there_is_none() -> None:
    library = native.library("cuda")
    if library is None:
        pytest.skip("installed without CUDA kernels")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_no_gpu_is_an_error(library)


def assert_no_gpu_is_an_error(library: ctypes.CDLL) -> None:
    mask = native.Mask(1, 1, 1, 8, scale=1)
    error = library.megalm_softmax_forward(ctypes.byref(mask), 0, *[None] * 5, 0)
    assert error in (NO_DRIVER, NO_DEVICE)


def test_the_cross_entropy_compiles_without_spills(tmp_path: Path) -> None:
    command = [
        compiler(),
        "-std=c++17",
        "-O3",
        "-arch=sm_90",
        "-Xptxas=-v",
        "-cubin",
        "-o",
        f"{tmp_path}/kernels.cubin",
    ]
    done = subprocess.run([*command, f"{SOURCES}/cross_entropy.cu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert_no_kernel_spills(done.stderr, kernels=2 * 3)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_a_build_links_without_spills_and_loads_without_a_gpu(tmp_path: Path, architecture: str) -> None:
    compiler()
    done = setup(
        "build_ext",
        f"--build-temp={tmp_path}/temp",
        f"--build-lib={tmp_path}/lib",
        MEGALM_CUDA_ARCHS=architecture,
        NVCC_APPEND_FLAGS="-Xptxas=-v",
        CXXFLAGS="-O0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    packs, types = 4, 3
    assert_no_kernel_spills(done.stdout, kernels=2 * types * (packs + 1) + 2 * types)
    [built] = (tmp_path / "lib" / "megalm").glob("_fused_softmax_cuda*.so")
    if not torch.cuda.is_available():
        assert_no_gpu_is_an_error(native.bind(ctypes.CDLL(str(built))))


@pytest.mark.full
def test_whole_packs_move_as_one_load_or_store(tmp_path: Path) -> None:
    command = [compiler(), "-std=c++17", "-O3", "-arch=compute_90", "-ptx", "-o", f"{tmp_path}/kernels.ptx"]
    subprocess.run([*command, f"{SOURCES}/softmax.cu"], check=True)
    kernels = (tmp_path / "kernels.ptx").read_text().split(".entry ")[1:]
    assert len(kernels) == 30
    for kernel in kernels:
        size, packs = re.search(r"(warp|block)_(?:forward|backward)I\w*?(?:Li(\d)E)?E", kernel).groups()  # type: ignore[union-attr]
        assert re.search(r"ld\.global\.v4\.[ubf]32", kernel), kernel[:200]
        assert re.search(r"st\.global\.v4\.[ubf]32", kernel), kernel[:200]
        if size == "warp":
            assert len(re.findall(r"st\.global\.v4", kernel)) >= int(packs)
