"""The native modules, built once more with the address and undefined-behaviour sanitizers, under their own tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
INDEXED_DATASET = [
    "tests/native/test_indexed_dataset_reader.py",
    "tests/native/test_indexed_dataset_writer.py",
    "tests/native/test_indexed_dataset_merge.py",
    "tests/native/test_damaged_files.py",
    "tests/native/test_batch_memory.py",
    "tests/data/test_dataset.py",
    "tests/data/test_assemble.py",
    # These limit the memory that may be mapped, of which the address sanitizer takes terabytes.
    "--deselect=tests/native/test_indexed_dataset_merge.py::test_memory_does_not_grow_with_the_documents",
    "--deselect=tests/native/test_batch_memory.py::test_sizes_that_are_not_asked_for_again_are_let_go",
]
ATTENTION = [
    "tests/ops/test_cpu_attention.py",
    # They know nothing of the sanitizers' code, or take too long in it.
    "--deselect=tests/ops/test_cpu_attention.py::test_the_operator_is_registered_soundly_for_compilation_and_autograd",
    "--deselect=tests/ops/test_cpu_attention.py::test_a_compiled_call_gives_the_same_bits",
]
RUN = """
import importlib.util, sys
name = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def runtime(name: str) -> str:
    """Where the compiler keeps a library, or an empty string."""
    if shutil.which(compiler()) is None:
        return ""
    asked = [compiler(), f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) else ""


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("_indexed_dataset", INDEXED_DATASET),
        pytest.param("_attention", ATTENTION, marks=[pytest.mark.full, pytest.mark.timeout(520)]),
    ],
)
def test_no_test_of_a_native_module_meets_undefined_behaviour(tmp_path: Path, name: str, tests: list[str]) -> None:
    libraries = [runtime(library) for library in ("libasan.so", "libubsan.so", "libstdc++.so")]
    if not all(libraries):
        pytest.skip(f"{compiler()} has no shared libraries of the sanitizers")
    flags = {"CXXFLAGS": f"-O0 -D_GLIBCXX_ASSERTIONS {SANITIZERS}", "LDFLAGS": SANITIZERS, "MEGALM_CUDA_ARCHS": ""}
    build = [sys.executable, "setup.py", "build_ext", f"--build-temp={tmp_path}/temp", f"--build-lib={tmp_path}/lib"]
    build.append(f"--only=megalm.{name}")
    subprocess.run(build, cwd=ROOT, env={**os.environ, **flags}, timeout=250, check=True)
    [module] = (tmp_path / "lib" / "megalm").glob(f"{name}*.so")
    assert b"__asan_init" in module.read_bytes()
    # Loaded before Python, which is not built with them, and whose own leaks at its end are no matter here.
    loaded = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, f"megalm.{name}", str(module), "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **loaded}, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
