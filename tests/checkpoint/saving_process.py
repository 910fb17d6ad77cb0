"""A process that saves checkpoints on request, each time in a forked child that a test may kill.

A line of JSON on stdin is a request {root, steps, keep, value, die_at, file_limit}; lines on stdout are the child's
pid, then `saved STEP` or `refused MESSAGE` for each step, then `ended STATUS`. `steps: null` saves on and on from the
newest. `die_at: n` kills the child by SIGKILL just before its n-th change of the file system under root.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megalm.checkpoint import complete, load, read_manifest, save, whole
from megalm.errors import UserError


def content(value: int) -> dict[str, torch.Tensor]:
    """Tensors that all say `value`, so that a mix of two saves is seen."""
    return {f"tensor.{i}": torch.full((64, 256), value, dtype=torch.int64) for i in range(8)}


def read_consistent(directory: Path) -> tuple[int, int]:
    """Step and value of a checkpoint, after asserting that all of it is of one save."""
    into = content(-1)
    state = load(directory, whole(into))
    assert all((tensor == state["value"]).all() for tensor in into.values())
    return read_manifest(directory).step, state["value"]


def die_before_change(root: Path, number: int) -> None:
    events = count()

    def change(path: Any) -> None:
        if str(path).startswith(str(root)) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        # rmtree works relative to an open directory's descriptor, so its paths are bare names
        if event in ("os.remove", "os.rmdir") and not str(args[0]).startswith("/"):
            change(root)
        elif writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            change(args[0])

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        change(root)
        sync(descriptor)

    sys.addaudithook(hook)
    os.fsync = fsync


def serve(request: dict[str, Any]) -> None:
    root = Path(request["root"])
    if request.get("die_at") is not None:
        die_before_change(root, request["die_at"])
    if limit := request.get("file_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    newest = max((read_manifest(path).step for path in complete(root)), default=0)
    steps: Iterable[int] = count(newest + 1) if request["steps"] is None else request["steps"]
    for step in steps:
        value = request.get("value", step)
        try:
            save(root, step, whole(content(value)), {"value": value}, request["keep"])
            say(f"saved {step}")
        except UserError as error:
            say(f"refused {error}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                serve(json.loads(line))
                code = 0
            finally:
                os._exit(code)
        say(str(pid))
        say(f"ended {os.waitpid(pid, 0)[1]}")


if __name__ == "__main__":
    main()
