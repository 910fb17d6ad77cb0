"""Who am I among the processes of a run: decided here alone, from what the launcher left in the environment.

    torchrun, deepspeed, `megalm train --nproc`    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    Slurm's srun                                   SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, ...
    none of them                                   one process

An sbatch script has SLURM_PROCID, too, but only what srun starts is in a step of several tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megalm.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
LOCAL_RANK = ("--local_rank=", "--local-rank=")  # what DeepSpeed's launcher adds, which the environment says as well
STARTED = "MEGALM_STARTED"
"""Names when the command that starts ranks was called, in seconds since the epoch: a restart does not make it later."""
FIRST_PORT, PORTS = 20_000, 10_000  # below those that systems give to clients


@dataclass(frozen=True)
class Process:
    """One of `size` processes, `local_rank` on its machine; they find each other at `address`:`port`, where the
    launcher's `agent` keeps the store, or else the first of them."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    address: str = ""
    port: int = 0
    agent: bool = False
    started: int = 0
    """When the command was called that started it, 0 if that is not said."""


def who_am_i(environment: Mapping[str, str]) -> Process:
    """This process's place. Raises UserError if the launcher's variables are incomplete or make no sense."""
    if any(environment.get(name) for name in LAUNCHED[:3]):
        _complete(environment, LAUNCHED)
        rank, local_rank, size = (_number(environment, name) for name in LAUNCHED[:3])
        address, port = environment["MASTER_ADDR"], _number(environment, "MASTER_PORT")
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        _complete(environment, STEP)
        rank, local_rank, size = (_number(environment, name) for name in STEP[:3])
        one_host = environment.get("SLURM_STEP_NUM_NODES") == "1"
        meet = "localhost" if one_host else first_host(environment["SLURM_STEP_NODELIST"])
        address = environment.get("MASTER_ADDR") or meet
        own_port = FIRST_PORT + _number(environment, "SLURM_JOB_ID") % PORTS
        port = _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else own_port
    else:
        return Process()
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port: choose one from 1 to 65535")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not 0 <= rank < size:
        raise UserError(f"the environment says rank {rank} of {size} processes: correct RANK and WORLD_SIZE")
    if local_rank >= size:
        raise UserError(
            f"the environment says local rank {local_rank} of {size} processes: correct LOCAL_RANK and WORLD_SIZE"
        )
    started = _number(environment, STARTED) if environment.get(STARTED) else 0
    return Process(rank, local_rank, size, address, port, agent, started)


def first_host(nodes: str) -> str:
    """The first of Slurm's node list: `gpu[07-11,20],login` begins with `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^-,\]]+)[^\]]*\])?([^,]*)", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no node: set MASTER_ADDR to the first node's name")
    return "".join(part or "" for part in match.groups())


def _complete(environment: Mapping[str, str], names: tuple[str, ...]) -> None:
    there = [name for name in names if environment.get(name)]
    for name in names:
        if name not in there:
            raise UserError(
                f"{name} is not set, although {', '.join(there)} are: start the run with torchrun, deepspeed, srun or "
                "megalm train --nproc, which set all of them, or set none for one process"
            )


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UserError(f"{name}={text[:40]} is no whole number: correct the environment")
    return int(text)
