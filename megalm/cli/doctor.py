"""`megalm doctor`: a look at all places where a run would compute, before it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.config import Overrides
from megalm.errors import UserError


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file: layout, device, directory.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks on this machine, or with --slurm on each node.", show_default=False),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(metavar="HOSTS", help="Ranks on the hosts of a hostfile.", show_default=False)
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Ranks through srun: here, or on --nodes.")] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes to ask Slurm for; in a job: all of it.", show_default=False)
    ] = None,
) -> int:
    """Show what each rank of a run would find, and mark what differs or is slow; 1 if something differs."""
    from megalm.config import load_config
    from megalm.launch.ranks import who_am_i

    process = who_am_i(os.environ)
    arguments = ["--doctor", *([str(config)] if config else []), *(overrides or ())]
    if process.address or not (slurm or hostfile or nproc):
        from megalm.train.doctor import examine

        return examine(load_config(config, overrides or (), process.size) if config else None, process)
    if slurm:
        return _in_slurm(arguments, nodes, nproc)
    if nodes:
        raise UserError(f"--nodes={nodes}: is for --slurm: add that, or leave it out")
    if nproc:
        from megalm.launch.local import start_local

        return start_local(nproc, arguments)

    from megalm.launch.deepspeed import OnHosts
    from megalm.launch.hostfile import read_hostfile, read_variables

    assert hostfile is not None
    hosts = read_hostfile(hostfile)
    size = sum(map(len, hosts.values()))
    directory = Path(load_config(config, overrides or (), size).run.dir if config else "doctor")
    variables = read_variables(os.environ, Path.home(), Path.cwd())
    return OnHosts(hosts, os.environ).start(directory, arguments, variables)


def _in_slurm(arguments: list[str], nodes: int | None, nproc: int | None) -> int:
    asked = {"nodes": nodes, "ntasks-per-node": nproc}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    command = ["srun", "--kill-on-bad-exit=1", *options, sys.executable, "-m", "megalm.train", *arguments]
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        raise UserError("--slurm: there is no srun here: run it on a machine of the cluster") from None
