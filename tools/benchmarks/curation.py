"""Near-duplicate removal against rensa's own deduplicator and datasketch: the same text, in turn, a process each.

Prints MB of text a CPU-second, peak memory (with what is mapped of temporary files, which the system takes back when it
needs memory), how many bytes of it a document takes, from two sizes, and how many documents each removes. The peers
read the lines with orjson, split words at spaces and hand word 5-grams to their library, with 128 permutations and a
threshold of 0.8. Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

PERMUTATIONS, THRESHOLD, NGRAM = 128, 0.8, 5


def write_corpus(path: Path, documents: int, rng: random.Random) -> int:
    """Texts of 150 to 450 words, of which every tenth is another with a few words changed; their bytes."""
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(20_000)]
    recent: list[list[str]] = []
    size = 0
    with path.open("wb") as file:
        for i in range(documents):
            words = [vocabulary[int(20_000 * rng.random() ** 3)] for _ in range(rng.randrange(150, 450))]
            if i % 10 == 9:
                words = list(rng.choice(recent))
                for _ in range(2):
                    words[rng.randrange(len(words))] = "changed"
            recent = [*recent[-99:], words]
            text = " ".join(words)
            size += len(text)
            file.write(orjson.dumps({"id": i, "text": text}) + b"\n")
    return size


def shingles(path: Path) -> Iterator[list[str]]:
    with path.open("rb") as file:
        for line in file:
            words = orjson.loads(line)["text"].split()
            yield [" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]


def ours(path: Path) -> int:
    from megalm.data.curation.dedup import dedup

    with tempfile.TemporaryDirectory() as output:
        report = dedup([path], Path(output) / "out", threshold=THRESHOLD, ngram=NGRAM, unit_bytes=4 << 20)
    return report.exact + report.near


def rensa(path: Path) -> int:
    from rensa import RMinHash, RMinHashDeduplicator

    kept = RMinHashDeduplicator(THRESHOLD, PERMUTATIONS, True, None, 1)
    removed = 0
    for i, grams in enumerate(shingles(path)):
        (signature,) = RMinHash.from_token_sets([grams], PERMUTATIONS, 1)
        removed += not kept.add(str(i), signature)
    return removed


def datasketch(path: Path) -> int:
    from datasketch import MinHash, MinHashLSH

    kept = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    removed = 0
    for i, grams in enumerate(shingles(path)):
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([gram.encode() for gram in grams])
        if kept.query(signature):
            removed += 1
        else:
            kept.insert(str(i), signature)
    return removed


CONTENDERS: dict[str, Callable[[Path], int]] = {"ours": ours, "rensa": rensa, "datasketch": datasketch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--run", nargs=2, metavar=("CONTENDER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        removed = CONTENDERS[arguments.run[0]](Path(arguments.run[1]))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, removed)
        return
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.jsonl", Path(folder) / "large.jsonl"
        write_corpus(small, arguments.documents // 4, rng)
        size = write_corpus(large, arguments.documents, rng)
        print(f"{arguments.documents} documents, {size / 1e6:.1f} MB of text")
        first = 0.0
        for name in CONTENDERS:
            before, after = measure(name, small), measure(name, large)
            if before is None or after is None:
                print(f"{name:12} not installed")
                continue
            speed = size / 1e6 / after.seconds
            first = first or speed
            slope = (after.memory - before.memory) / (arguments.documents * 3 / 4)
            print(
                f"{name:12} {speed:7.2f} MB/CPU-s  (ours / it: {first / speed:6.2f})  "
                f"peak {after.memory / 1e6:6.0f} MB  {slope:7.0f} bytes a document  removed {after.removed}"
            )


class Measured(NamedTuple):
    """CPU-seconds, peak memory in bytes, and documents removed."""

    seconds: float
    memory: int
    removed: int


def measure(name: str, path: Path) -> Measured | None:
    """What a contender takes in a process of its own; None where it is not installed."""
    command = [sys.executable, __file__, "--run", name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        sys.exit(done.stderr)
    seconds, memory, removed = done.stdout.split()
    return Measured(float(seconds), int(memory), int(removed))


if __name__ == "__main__":
    main()
