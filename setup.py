"""Installs megalm: the package, the `megalm` command and the native modules under csrc/.

The native modules see pybind11 and the standard library only, never torch's headers, so that building needs a C++
compiler and nothing else, and an upgrade of torch never asks for a rebuild. Where CUDA's compiler is found, the
kernels for GPUs are built, too: for the architectures in MEGALM_CUDA_ARCHS (`80;90`; empty: none), else for this
machine's GPUs, else for the common ones.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
COMMON_CUDA_ARCHS = ["80", "90", "100"]  # A100, H100 and H200, B200; newer GPUs compile what is there for the last


# Flags of single files, whose code runs only where the processor has the instructions: see csrc/attention/dispatch.cpp.
# GCC 12 takes the undefined values in its own intrinsics for mistakes (its bug 105593), hence no warnings of that.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized"
FILE_FLAGS = {
    "csrc/attention/avx512.cpp": AVX512,
    "csrc/attention/avx512_bf16.cpp": f"{AVX512} -mavx512bf16",
    "csrc/attention/amx.cpp": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}


def native(name: str, folder: str, *flags: str) -> Extension:
    """One native module: every .cpp file in csrc/`folder`, compiled with `flags` besides the usual ones."""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob("*.cpp"))
    return Extension(name, sources, extra_compile_args=list(flags))


def find_nvcc() -> str | None:
    """CUDA's compiler: in CUDA_HOME, on the path, or where its installer puts it."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [f"{folders[0]}/bin/nvcc", shutil.which("nvcc"), f"{folders[1]}/bin/nvcc"]
    return next((nvcc for nvcc in found if nvcc and os.access(nvcc, os.X_OK)), None)


def cuda_architectures(nvcc: str) -> list[str]:
    """The compute capabilities to build for, ascending, such as `90`: those that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch.removeprefix("compute_") for arch in listed]
    asked = os.environ.get("MEGALM_CUDA_ARCHS")
    if asked is not None:
        archs = set(asked.replace(";", " ").replace(",", " ").replace(".", "").split())
        if not all(arch.isdigit() for arch in archs):
            raise SystemExit(f"MEGALM_CUDA_ARCHS={asked}: give compute capabilities such as 80;90, or nothing")
        if not archs <= set(known):
            raise SystemExit(f"MEGALM_CUDA_ARCHS={asked}: this nvcc compiles for {';'.join(known)} only")
        return sorted(archs, key=int)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        here = {line.strip().replace(".", "") for line in answer.splitlines()}
        if here and all(arch.isdigit() for arch in here):
            return sorted(here & set(known), key=int)
    return [arch for arch in COMMON_CUDA_ARCHS if arch in known]


class CudaLibrary(Extension):
    """Sources that `nvcc` compiles; no module: ctypes loads it."""

    def __init__(self, name: str, sources: list[str], nvcc: str, flags: list[str]) -> None:
        super().__init__(name, sources, extra_compile_args=flags)
        self.nvcc = nvcc


def cuda(name: str, folder: str) -> list[CudaLibrary]:
    """A library of every .cu file in csrc/`folder`; none, and a line that says so, where it cannot or shall not be."""
    nvcc = find_nvcc()
    architectures = cuda_architectures(nvcc) if nvcc else []
    if nvcc is None or not architectures:
        empty = "MEGALM_CUDA_ARCHS" in os.environ
        unknown = "MEGALM_CUDA_ARCHS is empty" if empty else "nvcc does not compile for this machine's GPUs"
        why = "no nvcc: set CUDA_HOME" if nvcc is None else unknown
        print(f"megalm: built without CUDA kernels ({why})")
        return []
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    flags.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob("*.cu"))
    return [CudaLibrary(name, sources, nvcc, flags)]


def for_host(ext: Extension) -> tuple[str, str, str]:
    """The compiler, and the flags to compile and to link with."""
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *(f"-I{i}" for i in includes)]
    flags.append("-ffp-contract=off")  # rounds alike on every machine, which the blending of order `megatron` needs
    flags += [*ext.extra_compile_args, os.environ.get("CXXFLAGS", "")]
    return os.environ.get("CXX", "c++"), " ".join(flags), f"-pthread -ldl {os.environ.get('LDFLAGS', '')}"


def for_cuda(ext: CudaLibrary) -> tuple[str, str, str]:
    """The same of a library of CUDA; nvcc itself reads NVCC_APPEND_FLAGS and NVCC_CCBIN. CUDA's runtime is linked in,
    so that the library loads, and says that there is no GPU, where no driver is."""
    flags = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return ext.nvcc, " ".join([*flags, *ext.extra_compile_args]), "-cudart=static"


class NinjaBuild(build_ext):
    """Compiles each extension through one generated build.ninja: parallel, and only what changed."""

    user_options: ClassVar = [*build_ext.user_options, ("only=", None, "the one extension to build")]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.only is not None:
            self.extensions = [ext for ext in self.distribution.ext_modules or [] if ext.name == self.only]

    def build_extension(self, ext: Extension) -> None:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        compiler, compile_flags, link_flags = for_cuda(ext) if isinstance(ext, CudaLibrary) else for_host(ext)
        with (work / "build.ninja").open("w") as file:
            ninja = Writer(file)
            ninja.variable("compiler", compiler)
            ninja.variable("compileflags", compile_flags)
            ninja.variable("linkflags", link_flags)
            command = "$compiler $compileflags $fileflags -MD -MF $out.d -c $in -o $out"
            ninja.rule("compile", command, depfile="$out.d", deps="gcc")
            ninja.rule("link", "$compiler -shared $in -o $out $linkflags")
            objects = []
            for source in ext.sources:
                objects.append(f"{Path(source).stem}.o")
                flags = FILE_FLAGS.get(source, "") if platform.machine() in ("x86_64", "AMD64") else ""
                ninja.build(objects[-1:], "compile", [str((ROOT / source).resolve())], variables={"fileflags": flags})
            ninja.build([str(output)], "link", objects)
            ninja.default(str(output))
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(work)], check=True)


setup(
    name="megalm",
    version="0.1.0",
    description="Pre-trains base language models: from a folder of text to a checkpoint, on any number of devices",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megalm", "megalm.*"]),
    package_data={"megalm": ["py.typed", "*.pyi"]},
    ext_modules=[
        native("megalm._attention", "attention"),
        native("megalm._indexed_dataset", "indexed_dataset"),
        native("megalm._order", "order"),
        native("megalm._fused_softmax_cpu", "fused_softmax", "-ffp-contract=fast"),  # no module: ctypes loads it
        *cuda("megalm._fused_softmax_cuda", "fused_softmax"),
    ],
    cmdclass={"build_ext": NinjaBuild},
    entry_points={"console_scripts": ["megalm = megalm.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "fsspec",
        "pydantic>=2",
        "pyyaml",
        "typer>=0.29",
        "rich",
        "orjson",
        "xxhash",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "tensorboard",
        "zstandard",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],
        "curation": ["rensa>=0.5", "py3langid>=0.4"],
        "fast": ["gigatoken>=0.10,<0.11"],
        "lm-eval": ["lm-eval>=0.4.13"],
        "parquet": ["pyarrow"],
        "tiktoken": ["tiktoken"],
        "plot": ["matplotlib"],
        "test": [
            "accelerate",
            "deepspeed>=0.19.8",
            "gigatoken>=0.10,<0.11",
            "hypothesis",
            "lm-eval[hf]>=0.4.13",
            "megatron-core",
            "mypy",
            "ninja",
            "peft",
            "psutil",
            "pyarrow",
            "pybind11",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "setuptools",
            "tiktoken",
            "transformers",
            "types-PyYAML",
        ],
    },
)
