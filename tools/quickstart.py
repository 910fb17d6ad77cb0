"""From nothing to a small base model that writes, on text that every machine with Python has.

Three sources: `code`, the standard library's modules; `docs`, their docstrings and pydoc's topics; `web`, the READMEs
in the metadata of installed packages. Each command is shown as it runs and can be typed by hand just so.
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import torch
import yaml

from megalm.cli import fail
from megalm.config import load_config
from megalm.config.sections import known
from megalm.model.counts import parameter_count
from megalm.train.device import DTYPES, measured_matmul

SOURCES = {"code": 0.5, "docs": 0.25, "web": 0.25}
PROMPTS = ("def read_file(path):\n", "class Stack:\n", "The module provides")
VALIDATION_SAMPLES = 16
SEQUENCE_LENGTH = 256


def modules() -> Iterator[tuple[Path, str]]:
    """The standard library's modules, its tests left out, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(path.relative_to(root).parts):
            yield path, path.read_text(encoding="utf-8", errors="ignore")


def code() -> Iterator[str]:
    for _, text in modules():
        yield text


def docs() -> Iterator[str]:
    for _, text in modules():
        try:
            tree = ast.parse(text)
        except SyntaxError:  # files that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring and len(docstring) > 80:
                    yield docstring + "\n"
    from pydoc_data.topics import topics

    yield from topics.values()


def web() -> Iterator[str]:
    for distribution in sorted(distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(description, str) and len(description) > 200:
            yield description


def fresh_directory(path: Path) -> None:
    """Makes `path` anew: what a quickstart before left there goes, and nothing else."""
    mark = path / ".quickstart"
    if mark.is_file():
        shutil.rmtree(path)
    if path.exists():
        sys.exit(fail(f"--output {path}: exists and is no earlier quickstart's: name another, or remove it"))
    path.mkdir(parents=True)
    mark.touch()


def write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, documents in (("code", code()), ("docs", docs()), ("web", web())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
        print(f"  {folder / name}.jsonl: {(folder / name).with_suffix('.jsonl').stat().st_size / 1e6:.1f} MB")


def faster_precision() -> str:
    """The type in which this machine multiplies matrices faster: bfloat16 only where the processor has units for it."""
    cpu = torch.device("cpu")
    speed = {name: measured_matmul(cpu, dtype) for name, dtype in DTYPES.items()}
    return max(speed, key=lambda name: speed[name])


def config(output: Path, steps: int, precision: str) -> dict[str, object]:
    return {
        "run": {"dir": str(output / "run")},
        "model": {"preset": "llama-tiny"},
        "tokenizer": {"path": str(output / "tokenizer")},
        "data": {
            "sequence_length": SEQUENCE_LENGTH,
            "sources": [
                {"name": name, "path": str(output / "data" / name), "weight": weight}
                for name, weight in SOURCES.items()
            ],
            "validation": {"samples": VALIDATION_SAMPLES},
        },
        "batch": {"global_size": 8, "micro_size": 8},
        "schedule": {"kind": "wsd", "steps": steps},
        "optimizer": {"learning_rate": 3.0e-3},
        "precision": {"compute": precision},
        "log": {"every": 5},
    }


def shown(*arguments: str) -> None:
    """Runs one command as a user would, its output shown; ends with its code if it fails."""
    print(f"\n$ {shlex.join(['megalm', *arguments])}", flush=True)
    program = str(Path(sys.executable).with_name("megalm"))
    code = subprocess.run([program, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def report(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" not in line]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    first, last, middle = evaluations[0], evaluations[-1], sorted(step["tokens_per_second"] for step in steps)
    mfu = sorted(step["mfu"] for step in steps)
    config = load_config(run / "config.yaml")
    print("\nresult")
    for name, value in (
        ("parameters", f"{parameter_count(config.model, known(config.model.vocab_size)):,}"),
        ("tokens seen", f"{steps[-1]['tokens']:,}"),
        ("training loss", f"{steps[-1]['loss']:.3f}"),
        (
            "validation loss",
            f"{last['loss']:.3f} ({last['loss'] / first['loss']:.0%} of its start, {first['loss']:.3f})",
        ),
        ("bits per byte", f"{last['bits_per_byte']:.3f}"),
        ("tokens/s", f"{middle[len(middle) // 2]:,.0f}"),
        ("share of the measured matmul peak", f"{mfu[len(mfu) // 2]:.0%}"),
    ):
        print(f"  {name:35}{value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("quickstart"))
    options = parser.parse_args()
    output, started = options.output, time.monotonic()
    fresh_directory(output)
    print("writing the corpus")
    write_corpus(output / "text")
    files = [str(output / "text" / f"{name}.jsonl") for name in SOURCES]
    tokenizer = str(output / "tokenizer")
    shown("tokenizer", "train", "--kind", "bpe", "--vocab-size", "4096", "--input", *files, "--output", tokenizer)
    for name, file in zip(SOURCES, files, strict=True):
        data = str(output / "data" / name)
        shown("data", "prepare", "--input", file, "--tokenizer", tokenizer, "--output", data)
    path = output / "config.yaml"
    path.write_text(yaml.safe_dump(config(output, options.steps, faster_precision()), sort_keys=False))
    print(f"\n{path}:\n{path.read_text()}")
    shown("train", str(path))
    run = str(output / "run")
    shown("evaluate", run, "--data", *(str(output / "data" / name) for name in SOURCES))
    for prompt in PROMPTS:
        shown("generate", run, "--prompt", prompt, "--max-new-tokens", "80", "--temperature", "0.7", "--top-p", "0.9")
    report(output / "run")
    print(f"  {'seconds':35}{time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
