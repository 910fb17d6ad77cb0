"""Who carries a device's messages: NCCL for GPUs; for CPUs gloo, with one worker thread a group.

torch gives each gloo group two workers, and both write the name of the collective that they completed into one
`std::string`, without a lock (torch 2.13, ProcessGroupGloo::runLoop). All-gather's name is too long for a string's own
bytes, so that one worker can write into memory that the other has just freed: with two collectives of a group on their
way, about one of 100,000 ended its process by "malloc(): unaligned chunk detected" or a segmentation fault. One worker
runs a group's collectives in their order, as NCCL does, and groups still run beside each other.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

NAME = "gloo_in_order"


def backend(device: torch.device, address: str = "") -> str:
    """What `init_process_group` takes for process groups on `device`. gloo listens at `address`, this machine's one on
    the ranks' network, unless GLOO_SOCKET_IFNAME names a device; without either, where its host name leads."""
    if device.type == "cuda":
        return "nccl"
    dist.Backend.register_backend(NAME, partial(_make, address), extended_api=True, devices=["cpu"])
    return NAME


def _make(address: str, group: Any, _: Any) -> ProcessGroupGloo:
    """What torch makes for "gloo", but for the number of threads. `group`: torch's DistributedBackendOptions."""
    gloo: Any = ProcessGroupGloo  # whose type stubs are not true
    options = gloo._Options()
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    devices = [gloo.create_device(interface=name) for name in interfaces.split(",") if name]
    devices = devices or [gloo.create_device(hostname=address) if address else gloo.create_default_device()]
    options._devices = devices
    options._threads = 1
    options._timeout = group.timeout
    options.global_ranks_in_group, options.group_name = group.global_ranks_in_group, group.group_id
    made = gloo(group.store, group.group_rank, group.group_size, options)
    made._set_sequence_number_for_group()
    return made
