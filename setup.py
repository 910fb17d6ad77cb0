"""Installs megalm: the package, the `megalm` command and the native modules under csrc/.

The native modules see pybind11 and the standard library only, never torch's headers, so that building needs a C++
compiler and nothing else, and an upgrade of torch never asks for a rebuild.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sysconfig
from pathlib import Path
from typing import ClassVar

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


# Flags of single files, whose code runs only where the processor has the instructions: see csrc/attention/dispatch.cpp.
# GCC 12 takes the undefined values in its own intrinsics for mistakes (its bug 105593), hence no warnings of that.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized"
FILE_FLAGS = {
    "csrc/attention/avx512.cpp": AVX512,
    "csrc/attention/avx512_bf16.cpp": f"{AVX512} -mavx512bf16",
    "csrc/attention/amx.cpp": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}


def native(name: str, folder: str) -> Extension:
    """One native module: every .cpp file in csrc/`folder`."""
    return Extension(name, sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob("*.cpp")))


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
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *(f"-I{i}" for i in includes)]
        flags.append("-ffp-contract=off")  # rounds alike on every machine, which the blending of order `megatron` needs
        with (work / "build.ninja").open("w") as file:
            ninja = Writer(file)
            ninja.variable("cxx", os.environ.get("CXX", "c++"))
            ninja.variable("cxxflags", " ".join(flags) + " " + os.environ.get("CXXFLAGS", ""))
            ninja.variable("ldflags", os.environ.get("LDFLAGS", ""))
            ninja.rule(
                "compile", "$cxx $cxxflags $fileflags -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            ninja.rule("link", "$cxx -shared $in -o $out $ldflags")
            objects = []
            for source in ext.sources:
                objects.append(f"{Path(source).stem}.o")
                flags_of = FILE_FLAGS.get(source, "") if platform.machine() in ("x86_64", "AMD64") else ""
                ninja.build(
                    objects[-1:], "compile", [str((ROOT / source).resolve())], variables={"fileflags": flags_of}
                )
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
    ],
    cmdclass={"build_ext": NinjaBuild},
    entry_points={"console_scripts": ["megalm = megalm.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "typer>=0.29",
        "rich",
        "orjson",
        "xxhash",
        "sentencepiece",
        "tokenizers",
        "tensorboard",
        "zstandard",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],
        "curation": ["rensa>=0.5", "py3langid>=0.4"],
        "fast": ["gigatoken>=0.10,<0.11"],
        "parquet": ["pyarrow"],
        "tiktoken": ["tiktoken"],
        "plot": ["matplotlib"],
        "test": [
            "deepspeed>=0.19.8",
            "gigatoken>=0.10,<0.11",
            "hypothesis",
            "megatron-core",
            "mypy",
            "ninja",
            "psutil",
            "pyarrow",
            "pybind11",
            "pytest",
            "pytest-timeout",
            "ruff",
            "safetensors",
            "setuptools",
            "tiktoken",
            "transformers",
            "types-PyYAML",
        ],
    },
)
