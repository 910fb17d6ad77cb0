"""A real Slurm on the two hosts of `hosts.py`: munge, slurmctld on node1, a slurmd on each; 8 processors and 4 "GPUs"
a node, whatever the machine has.

    with Hosts(folder) as hosts, Slurm(hosts) as slurm:
        job = slurm.submit("script.sh", "--nodes=2")
        slurm.wait_for(job, "COMPLETED")

There are also a spare node, which is not up, and 600 nodes of a big cluster, which never are: enough for
`sbatch --test-only`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from hosts import Hosts

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# A job that asks for the queue must not wait for its credential's end (cred_expire), nor a lost node's for minutes; but
# a machine that is busy with other tests must not look like a lost node.
CONF = """
ClusterName=megalm
SlurmctldHost=node1({node1})
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=60
KillWait=30
MinJobAge=3600
JobRequeue=1
SchedulerParameters=sched_interval=2,requeue_delay=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=86400
SuspendExcNodes=node[1-2],spare
NodeName=node1 NodeAddr={node1} CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
NodeName=node2 NodeAddr={node2} CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
NodeName=spare NodeHostname=node1 NodeAddr={node1} Port={spare_port} CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
NodeName=big[1-600] NodeAddr={node2} CPUs=64 RealMemory=1000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=node[1-2],spare Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=big Nodes=big[1-600] MaxTime=INFINITE State=UP
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def needed() -> str:
    """What is missing for a Slurm here; empty if all is there."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}: make cluster" if missing else ""


class Slurm:
    """While entered, Slurm runs; so may jobs, which end with it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        self._conf = self.folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        for name in ("state", "spool-node1", "spool-node2", "spool-spare"):
            (self.folder / name).mkdir(parents=True)
        addresses = {name: self.hosts.address(name) for name in self.hosts.names}
        self._conf.write_text(
            CONF.format(folder=self.folder, port=16817, slurmd_port=16818, spare_port=16819, **addresses)
        )
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/tty[10-13]\n")  # any four character devices
        try:
            self._munge()
            self._start("slurmctld", "node1", "slurmctld", "-D", "-c", "-f", str(self._conf))
            for name in self.hosts.names:
                self.start_node(name)
            self._wait(lambda: self.client("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split().count("idle") == 2)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _munge(self) -> None:
        """Its own daemon and key, so that a machine's own is left alone."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        words = ("--foreground", "--force", f"--socket={self.folder}/munge.socket", f"--key-file={key}")
        more = (f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log")
        self._start("munged", None, "munged", *words, *more, f"--seed-file={self.folder}/munge.seed")
        self._wait((self.folder / "munge.socket").exists)

    def start_node(self, name: str) -> None:
        """One of the hosts, or `spare`, a third node that is on the first host, too."""
        self._start(
            f"slurmd-{name}",
            name if name in self.hosts.names else "node1",
            "slurmd",
            "-D",
            "-N",
            name,
            "-f",
            str(self._conf),
        )

    def kill_node(self, name: str) -> None:
        """As if its power had failed: slurmd and all that it started."""
        for process in self.hosts.processes(name, ""):
            if process.name() in ("slurmd", "slurmstepd", "python", "srun") or "megalm" in " ".join(process.cmdline()):
                process.kill()
        self._daemons.pop(f"slurmd-{name}").wait()

    def _start(self, title: str, host: str | None, *words: str) -> None:
        command = self.hosts.command(host, *words) if host else list(words)
        with (self.folder / f"{title}.out").open("wb") as out:
            self._daemons[title] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=self._environment
            )

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self._conf)}

    def _wait(self, ready: object, seconds: float = 60) -> None:
        assert callable(ready)
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                said = "\n".join(path.read_text()[-1500:] for path in self.folder.glob("*.out"))
                pytest.fail(f"Slurm does not start: {said}")
            time.sleep(0.3)

    def run(self, *words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """A client's command on node1."""
        command = self.hosts.command("node1", "env", f"--chdir={cwd or self.folder}", *words)
        variables = {**self._environment, **environment}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)

    def client(self, *words: str) -> str:
        return self.run(*words).stdout

    def submit(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """The job's number."""
        answer = self.run("sbatch", "--parsable", *words, cwd=cwd, **environment)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def field(self, job: str, name: str) -> str:
        match = re.search(rf"\b{name}=(\S*)", self.client("scontrol", "show", "job", job))
        return match[1] if match else ""

    def wait_for(self, job: str, *states: str, seconds: float = 600) -> str:
        """Waits until the job is in one of the states."""
        deadline = time.monotonic() + seconds
        while (state := self.field(job, "JobState")) not in states:
            if time.monotonic() > deadline:
                pytest.fail(f"job {job} is {state} ({self.field(job, 'Reason')}) and not {' or '.join(states)}")
            time.sleep(0.5)
        return state

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for daemon in reversed(self._daemons.values()):
            inside = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            for process in inside or [daemon]:  # nsenter ends with the daemon that it started
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            daemon.wait()
