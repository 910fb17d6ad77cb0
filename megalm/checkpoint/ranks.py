"""Doing something on all ranks so that it succeeds on all or fails on all.

    rank 0   act --.                .--> judge(what all gave) --.
    rank 1   act --+---- gather ----'                           +---- broadcast ----> the same answer or error
    rank 2   act --'                                            |

What is sent is JSON, since unpickling runs whatever it is sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megalm.checkpoint.manifest import DamagedCheckpoint
from megalm.errors import UserError

ERRORS = {"damaged": DamagedCheckpoint, "refused": UserError, "failed": RuntimeError}


def rank_in(group: ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def nothing(*_: Any) -> None:
    pass


def together(
    group: ProcessGroup | None, act: Callable[[], Any] = nothing, judge: Callable[[list[Any]], Any] = nothing
) -> Any:
    """Runs `act` on each rank, then on rank 0 `judge` with what all gave, by rank; gives its answer to all.

    Both give JSON. If either raises on any rank, all raise the same UserError or DamagedCheckpoint, or RuntimeError
    for any other exception; only who raised it raises the exception itself. `group` None: this process alone.
    """
    mine, failure = _attempt(act)
    told = _gather(group, mine)
    verdict = None
    if told is not None:
        answers = [json.loads(answer) for answer in told]
        failed = [answer | {"rank": rank} for rank, answer in enumerate(answers) if "error" in answer]
        if failed:  # a bug or an interrupt before damage, which one may go on after
            verdict = json.dumps(max(failed, key=lambda answer: list(ERRORS).index(answer["error"]))).encode()
        else:
            verdict, failure = _attempt(lambda: judge([answer["value"] for answer in answers]))
    outcome = json.loads(_broadcast(group, verdict))
    if "error" not in outcome:
        return outcome["value"]
    if failure and (outcome["rank"] == rank_in(group) or not isinstance(failure, Exception)):
        raise failure
    raise ERRORS[outcome["error"]](outcome["message"]) from failure


def _attempt(act: Callable[[], Any]) -> tuple[bytes, BaseException | None]:
    """What to tell the others, and the exception that ended `act`."""
    try:
        return json.dumps({"value": act()}).encode(), None
    except BaseException as error:
        kind = next((kind for kind, known in ERRORS.items() if kind != "failed" and isinstance(error, known)), "failed")
        message = str(error) if kind != "failed" else f"{type(error).__name__}: {error}"
        return json.dumps({"error": kind, "message": message, "rank": 0}).encode(), error


def _device(group: ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _gather(group: ProcessGroup | None, mine: bytes) -> list[bytes] | None:
    """What all ranks gave, on rank 0; None on the others."""
    if group is None:
        return [mine]
    device, ranks, first = _device(group), dist.get_world_size(group), rank_in(group) == 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group)
    longest = max(int(length) for length in lengths)
    padded = torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8).to(device)
    gathered = [torch.empty_like(padded) for _ in range(ranks)] if first else None
    dist.gather(padded, gathered, group=group, group_dst=0)
    return [bytes(data.cpu().numpy()) for data in gathered] if gathered else None  # JSON ignores the trailing spaces


def _broadcast(group: ProcessGroup | None, verdict: bytes | None) -> bytes:
    """Rank 0's `verdict`, on all."""
    if group is None:
        assert verdict is not None
        return verdict
    device = _device(group)
    length = torch.tensor([len(verdict or b"")], device=device)
    dist.broadcast(length, group=group, group_src=0)
    data = torch.frombuffer(bytearray(verdict or bytes(int(length))), dtype=torch.uint8).to(device)
    dist.broadcast(data, group=group, group_src=0)
    return bytes(data.cpu().numpy())
