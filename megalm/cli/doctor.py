"""`megalm doctor`: a look at all places where a run would compute, before it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.config import Overrides
from megalm.cli.train import devices
from megalm.errors import UserError


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="YAML file: layout, device, directory.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks on this machine, if not as many as the layout needs; with --slurm, on each node.",
            show_default=False,
        ),
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
    from megalm.config.load import fitting_processes
    from megalm.launch.ranks import who_am_i

    process = who_am_i(os.environ)
    ways = {"--slurm": slurm, "--hostfile": hostfile, "--nproc": nproc and not slurm}
    given = [option for option, value in ways.items() if value]
    if nodes and not slurm:
        raise UserError(f"--nodes={nodes}: is for --slurm: add that, or leave it out")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} start ranks in different ways: choose one")
    if given and process.address:
        raise UserError(f"{given[0]}: another launcher has started {process.size} processes: leave it out")
    arguments = ["--doctor", *([str(config)] if config else []), *(overrides or ())]
    if slurm:
        return _in_slurm(arguments, nodes, nproc)
    if hostfile:
        from megalm.launch.deepspeed import OnHosts
        from megalm.launch.hostfile import read_hostfile, read_variables

        hosts = read_hostfile(hostfile)
        size = sum(map(len, hosts.values()))
        directory = Path(load_config(config, overrides or (), size).run.dir if config else "doctor")
        variables = read_variables(os.environ, Path.home(), Path.cwd())
        return OnHosts(hosts, os.environ).start(directory, arguments, variables)
    size = process.size
    if not process.address:
        size = nproc or (fitting_processes(config, overrides or (), devices) if config else 1)
    loaded = load_config(config, overrides or (), size) if config else None
    if not process.address and size > 1:
        from megalm.launch.local import start_local

        return start_local(size, arguments)

    from megalm.train.doctor import examine

    return examine(loaded, process)


def _in_slurm(arguments: list[str], nodes: int | None, nproc: int | None) -> int:
    asked = {"nodes": nodes, "ntasks-per-node": nproc}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    command = ["srun", "--kill-on-bad-exit=1", *options, sys.executable, "-m", "megalm.train", *arguments]
    try:
        code = subprocess.run(command).returncode
        return code if code >= 0 else 128 - code
    except FileNotFoundError:
        raise UserError("--slurm: there is no srun here: run it on a machine of the cluster") from None
