"""Saving and loading a checkpoint against plain writing and reading of as many bytes on the same disk, in turn.

Writing: a plain file, written and synced, against a checkpoint that is saved at once: checksums, manifest and renaming
included, the deletion of the one before not. Stall: for how long the step loop stands still for a checkpoint that is
saved in the background, against one that is saved at once: what a step's passes (matrix products that take as long as
`--passes` says) take longer while the copy is made, the wait for it, and after the writing the commit. The first round,
which takes the host's memory, is not counted but shown. Reading: files that the page cache was asked to forget,
and files in it, into fresh memory, against a load of the checkpoint, verified, into tensors that are there.

One process. Medians of all rounds; a checkpoint that is saved in the background has the CPUs for itself here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalm.checkpoint import Saver, load, whole

CHUNK = 16 << 20


def seconds(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def tensors(total: int, width: int) -> dict[str, torch.Tensor]:
    """Parameters and two moments of matrices [4 x width, width], of `total` bytes or a little less."""
    count = max(1, total // (3 * 4 * width * width * 4))
    names = [f"{kind}.{number}" for kind in ("model", "moment", "square") for number in range(count)]
    return {name: torch.randn(4 * width, width) for name in names}


def write_plainly(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), CHUNK):
            file.write(data[start : start + CHUNK])
        os.fsync(file.fileno())


def read_plainly(path: Path, size: int) -> None:
    view = torch.empty(size, dtype=torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        done = 0
        while count := file.readinto(view[done : done + CHUNK]):
            done += count


def forget(directory: Path) -> None:
    """Asks the page cache to drop the files."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the checkpoint")
    parser.add_argument("--width", type=int, default=1024, help="of its matrices")
    parser.add_argument("--passes", type=float, default=1.0, help="seconds of a step's passes, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; a temporary one if not given")
    arguments = parser.parse_args()
    state = tensors(arguments.megabytes * 10**6, arguments.width)
    size = sum(tensor.nbytes for tensor in state.values())
    data = torch.cat([tensor.reshape(-1) for tensor in state.values()]).view(torch.uint8).numpy().data
    square = torch.randn(1024, 1024)
    products = max(1, round(arguments.passes / min(seconds(lambda: square @ square) for _ in range(5))))

    def passes() -> None:
        for _ in range(products):
            torch.mm(square, square)

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        plain = Path(folder, "plain")
        plain.mkdir()
        at_once = Saver(Path(folder, "at-once"), keep=1)
        behind = Saver(Path(folder, "behind"), keep=1, asynchronous=True)
        for step in range(1, arguments.rounds + 2):
            found = {}
            (plain / "file").unlink(missing_ok=True)
            found["plain write"] = seconds(lambda: write_plainly(plain / "file", data))

            def save_at_once(step: int = step) -> None:
                at_once.start(step, whole(state), {})
                at_once.commit()

            found["save at once"] = seconds(save_at_once)
            at_once.close()
            found["passes"] = seconds(passes)
            start = time.perf_counter()
            found["start"] = seconds(lambda step=step: behind.start(step, whole(state), {}))  # type: ignore[misc]
            passes()
            behind.settle()
            lost = time.perf_counter() - start - found["passes"]
            while not behind.progress:
                time.sleep(0.01)
            found["background writing"] = time.perf_counter() - start
            found["stall"] = lost + seconds(behind.commit)
            behind.close()
            saved = at_once.root / f"step-{step:08d}"
            assert isinstance(saved, Path)
            for kind in ("cold", "cached"):
                if kind == "cold":
                    forget(plain)
                    forget(saved)
                found[f"plain read, {kind}"] = seconds(lambda: read_plainly(plain / "file", size))
                found[f"load, {kind}"] = seconds(lambda saved=saved: load(saved, whole(state)))  # type: ignore[misc]
            if step == 1:
                print(f"{size / 1e6:,.0f} MB; the first background save stalls for {found['stall']:.3f} s")
                continue
            for name, value in found.items():
                times.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, value in middle.items():
        print(
            f"  {name:20} {value:7.3f} s  {size / value / 1e6:8,.0f} MB/s   {' '.join(f'{v:.3f}' for v in times[name])}"
        )
    print(f"stall of a background save, of one at once: {middle['stall'] / middle['save at once']:.1%}")
    print(f"bandwidth of a save at once, of plain writing: {middle['plain write'] / middle['save at once']:.1%}")
    for kind in ("cold", "cached"):
        ratio = middle[f"plain read, {kind}"] / middle[f"load, {kind}"]
        print(f"bandwidth of a load, of plain reading, {kind}: {ratio:.1%}")


if __name__ == "__main__":
    main()
