"""`megalm launch --slurm`: a batch script for Slurm, made from the config and what the job asks for.

    sbatch -> srun, a rank a task -> ranks train
                                     USR1 from Slurm before the time is over: they save, leave word, end with 0
           <- scontrol requeue, if they ended well and left word that there is more to do, or if they failed and there
              is a new checkpoint: a lost node ends the others before Slurm notices, and a failure that comes back at
              the same place must not come back for ever

Exit codes say too little to decide about the queue: with --kill-on-bad-exit srun makes one code of many. A job that is
cancelled loses its script at once and is not queued again.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config import Config, load_config
from megalm.errors import UserError

STOPPED = "stopped"
"""The file in its directory with which a run says that it has more to do."""
SAVED = "saved the checkpoint of step"
"""What its log says of each, wherever they are."""
MOST_BEFORE = 65_535  # seconds
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,@+-]*")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d\d?))?(?::(?P<third>\d\d?))?")

SCRIPT = """\
#!/bin/bash
# Trains on {nodes} nodes. Before its time is over it saves, and is queued again until the run is complete.
# After a failure it is queued again if there is a new checkpoint since its start.
{options}
set -uo pipefail
run={directory}
newest() {{ grep -o '{saved} [0-9]*' "$run/train.log" 2>/dev/null | tail -n 1; }}
before=$(newest)

{command}
code=$?
if {{ ((code == 0)) && [[ -e $run/{stopped} ]]; }} || {{ ((code != 0)) && [[ $(newest) != "$before" ]]; }}; then
    scontrol requeue "$SLURM_JOB_ID" || code=1
fi
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What a job asks Slurm for. Anything else can be asked for by sbatch's own variables, such as SBATCH_QOS."""

    nodes: int
    gpus_per_node: int | None = None
    """Also the processes a node; without GPUs those are `processes_per_node`."""
    processes_per_node: int = 1
    time: str | None = None
    """At most so long, in one of Slurm's notations; None: the partition's default."""
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """A `.sif` file for Apptainer, or an image for Slurm's plugin Pyxis."""
    signal_before: int = 120
    """Seconds before the end at which the ranks are told to save. Slurm may be up to a minute early."""

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node or self.processes_per_node


def launch_on_slurm(config: Path, overrides: Sequence[str], job: Job, dry_run: bool) -> int:
    """Submits a job that trains `config`, or with `dry_run` prints its batch script. Returns an exit code; raises
    UserError for what is wrong with the config or the job, or where there is no Slurm."""
    _check(job)
    loaded = load_config(config, overrides, job.nodes * job.tasks_per_node)
    text = _script(loaded, [str(config), *overrides], job)
    if dry_run:
        print(text, end="")
        return 0
    try:
        answer = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "--slurm: there is no sbatch here: submit from a machine of the cluster, or print the script with --dry-run"
        ) from None
    if answer.returncode:
        raise UserError(f"Slurm refuses the job: {answer.stderr.strip().removeprefix('sbatch: ')}")
    number = answer.stdout.strip().partition(";")[0]
    print(f"job {number} is submitted; what it says goes to {_name(loaded)}-{number}.log")
    return 0


def _script(config: Config, arguments: Sequence[str], job: Job) -> str:
    command, python = ["srun", "--kill-on-bad-exit=1"], sys.executable
    if job.container is not None:
        folders = sorted(_folders(config, Path(arguments[0])))
        command += _in_container(job.container, folders, job.gpus_per_node is not None)
        python = "python"
    return SCRIPT.format(
        nodes=job.nodes,
        options="\n".join(f"#SBATCH --{option}" for option in _options(job, _name(config))),
        command=shlex.join([*command, python, "-m", "megalm.train", *arguments]),
        directory=shlex.quote(str(Path(config.run.dir).absolute())),
        saved=SAVED,
        stopped=STOPPED,
    )


def _options(job: Job, name: str) -> Iterator[str]:
    yield f"job-name={name}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.tasks_per_node}"
    for option in ("gpus_per_node", "time", "partition", "account"):
        if (value := getattr(job, option)) is not None:
            yield f"{option.replace('_', '-')}={value}"
    yield f"signal=USR1@{job.signal_before}"
    yield "requeue"
    yield "open-mode=append"
    yield "output=%x-%j.log"


def _name(config: Config) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", Path(config.run.dir).absolute().name).lstrip("-.") or "megalm"


def _check(job: Job) -> None:
    for option in ("partition", "account"):
        if (value := getattr(job, option)) is not None and not WORD.fullmatch(value):
            raise UserError(f"--{option}={value!r} is no name that Slurm knows: correct it")
    if job.signal_before > MOST_BEFORE:
        raise UserError(f"--signal-before={job.signal_before} is more than Slurm takes: choose at most {MOST_BEFORE}")
    seconds = None if job.time is None else _seconds(job.time)
    if seconds is not None and seconds <= job.signal_before + 60:
        raise UserError(
            f"--time={job.time} leaves no time to train: Slurm may tell the ranks to save up to a minute before "
            f"--signal-before={job.signal_before}: choose a longer time or a later signal"
        )


def _seconds(time: str) -> int | None:
    """A time limit of Slurm's in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for `infinite`."""
    if time.lower() in ("infinite", "unlimited"):
        return None
    match = TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time={time}: write minutes, H:MM:SS or D-HH:MM:SS, as for sbatch")
    first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
    if match["days"] is not None or match["third"] is not None:
        return 86400 * int(match["days"] or 0) + 3600 * first + 60 * second + third
    return 60 * first + second


def _in_container(image: str, folders: list[str], gpus: bool) -> list[str]:
    """The words between `srun` and what runs in the container, which sees `folders`."""
    if image.endswith(".sif"):
        binds = ["--bind", ",".join(folders), "--pwd", str(Path.cwd())]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, image]
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    return [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={Path.cwd()}"]


def _folders(config: Config, file: Path) -> Iterator[str]:
    """What a run needs to see: the working directory, and what lies elsewhere of its config's `file` and of that which
    it names. Raises UserError for what a container cannot be shown."""
    here = Path.cwd()
    yield str(here)
    tokenizer = None if config.tokenizer.path == "byte" else config.tokenizer.path
    read = [source.path for source in config.data.sources]
    read += filter(None, (tokenizer, config.run.init_from, config.parallel.pipeline.costs_from))
    written = [Path(config.run.dir)]
    if config.checkpoint.path is not None:
        from megalm.checkpoint import place  # imports torch, which nothing else here needs

        own = place(config.checkpoint.path, "checkpoint.path")
        written += [own] if isinstance(own, Path) else []
    there = [next(parent for parent in path.absolute().parents if parent.is_dir()) for path in written]
    for path in (file.absolute().parent, *(Path(name).absolute() for name in read), *there):
        if path == Path("/"):
            raise UserError("--container: a folder of the run would be made in /, which would hide the image: make it")
        if re.search("[,:]", str(path)):
            raise UserError(f"--container: {path} cannot be shown to it: choose a path without commas and colons")
        if not path.is_relative_to(here):
            yield str(path)
