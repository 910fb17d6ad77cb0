"""`megalm launch`: a config to a run on many hosts, over ssh or as a job of Slurm's."""

from __future__ import annotations

import os
import time as clock
from pathlib import Path
from typing import Annotated

import typer

from megalm.cli.config import ConfigFile, MaxRestarts, Overrides
from megalm.errors import UserError


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hosts, a line each, such as `node1 slots=8`.", show_default=False)
    ] = None,
    include: Annotated[str, typer.Option(help="Only these of them, such as node1@node2:0,2.", show_default=False)] = "",
    exclude: Annotated[str, typer.Option(help="All but these, in the same form.", show_default=False)] = "",
    max_restarts: MaxRestarts = 0,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a job to Slurm instead.")] = False,
    nodes: Annotated[int | None, typer.Option(min=1, help="Slurm: nodes.", show_default=False)] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Slurm: GPUs a node, with a process each.", show_default=False)
    ] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Slurm: processes a node without GPUs.", show_default=False)
    ] = None,
    time: Annotated[str | None, typer.Option(help="Slurm: time limit, such as 24:00:00.", show_default=False)] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm: partition.", show_default=False)] = None,
    account: Annotated[str | None, typer.Option(help="Slurm: account.", show_default=False)] = None,
    container: Annotated[
        str | None, typer.Option(help="Slurm: a .sif file, or an image for Pyxis.", show_default=False)
    ] = None,
    signal_before: Annotated[
        int | None,
        typer.Option(min=1, help="Slurm: seconds before its end at which to save.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all on all hosts, then stop; Slurm: print the batch script.")
    ] = False,
) -> int:
    """Train on many hosts."""
    asked = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "processes_per_node": processes_per_node,
        "time": time,
        "partition": partition,
        "account": account,
        "container": container,
        "signal_before": signal_before,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if slurm:
        on_hosts = {"--hostfile": hostfile, "--include": include, "--exclude": exclude, "--max-restarts": max_restarts}
        for option, value in on_hosts.items():
            if value:
                raise UserError(f"{option}={value}: Slurm chooses the hosts, and queues the job again: leave it out")
        if nodes is None:
            raise UserError("--slurm: on how many nodes? Add --nodes 2")

        from megalm.launch.slurm import Job, launch_on_slurm

        return launch_on_slurm(config, overrides or (), Job(**given), dry_run)  # type: ignore[arg-type]
    if given:
        option = next(iter(given))
        raise UserError(f"--{option.replace('_', '-')}={given[option]}: is for --slurm: add that, or leave it out")
    if hostfile is None:
        raise UserError("on which hosts? Name --hostfile HOSTS, or --slurm --nodes N")

    from megalm.config import load_config
    from megalm.launch.deepspeed import OnHosts
    from megalm.launch.hostfile import read_hostfile, read_variables, selected
    from megalm.launch.ranks import STARTED, who_am_i
    from megalm.launch.restarts import with_restarts
    from megalm.train.signals import in_seconds

    if who_am_i(os.environ).address:
        raise UserError("megalm launch: another launcher has started this process: use megalm train in its place")
    hosts = selected(read_hostfile(hostfile), include, exclude)
    variables = read_variables(os.environ, Path.home(), Path.cwd())
    size = sum(map(len, hosts.values()))
    section = load_config(config, overrides or (), size).run
    directory = Path(section.dir)
    launcher = OnHosts(hosts, os.environ)
    arguments = [str(config), *(overrides or ()), *(["--dry-run"] if dry_run else [])]
    started = int(clock.time())
    variables[STARTED] = str(started)
    until = started + in_seconds(section.time_limit)
    return with_restarts(lambda: launcher.start(directory, arguments, variables), max_restarts, directory, until)
