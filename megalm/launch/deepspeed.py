"""Starts the ranks of a run on hosts, through DeepSpeed's launcher, and does what that leaves undone.

    one host, which is this one      deepspeed --no_ssh
    hosts, by ssh                    deepspeed -> pdsh -> ssh to each -> its launcher there -> ranks
    inside a Slurm allocation        srun, one task a host -> deepspeed --no_ssh -> ranks

What it leaves undone, measured with 0.19: it reads arguments and variables with the shells of all hosts, writes
variables into its log, calls a run whose pdsh was killed a success, leaves ranks alone when it is killed itself, and
says forty lines about a failure, the cause not first. So all that matters is passed in a file (`job`); its success
counts only together with the first rank's word; and in the end each host is looked through for what is left.
"""

from __future__ import annotations

import ipaddress
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from megalm.errors import UserError
from megalm.launch.hostfile import Hosts
from megalm.launch.job import Job, job
from megalm.launch.lifeline import TO_END, end_with_parent
from megalm.launch.ranks import FIRST_PORT, PORTS

Way = Literal["here", "ssh", "slurm"]
SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3")
TO_SAY = 25.0  # seconds that the other hosts' ranks have to find and say the cause, after one host has failed
PASSED_ON = ("MLFLOW", "MV2", "UCX", "NCCL", "GLOO", "TORCH", "OMP", "MKL", "PYTHON", "HF_", "MEGALM")
"""Beginnings of the names of variables that ranks on other hosts are given, as DeepSpeed's launcher would."""
LAUNCHERS = ("HOME", "USER", "LOGNAME", "LANG", "LC_", "TMPDIR", "SSH_", "KRB5", "PDSH_", "DS_ACCEL", "SLURM_")
"""Those that the launcher itself is given: it writes some of what it has into its log and other hosts' shells."""
PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
HARMLESS = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
ITS_LOG = re.compile(r"\[\d{4}-\d\d-\d\d [^\]]*\] \[\w+\] \[\w+\.py:\d+")
RANK_DIED = re.compile(r"--local_rank=(\d+).*exits with return code = -(\d+)")
HOST_FAILED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)|srun: error: ()(.*)")
OURS = "megalm: error: "


@dataclass
class Said:
    """What came out of the ranks and launchers that is not for the terminal at once."""

    errors: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    host_failed: threading.Event = field(default_factory=threading.Event)


class OnHosts:
    """Where the ranks run and how the hosts are reached. Raises UserError if they cannot be."""

    def __init__(self, hosts: Hosts, environment: Mapping[str, str]) -> None:
        if find_spec("deepspeed") is None:
            raise UserError("megalm launch starts ranks with DeepSpeed's launcher: pip install 'megalm[deepspeed]'")
        if not HARMLESS.fullmatch(sys.executable):
            raise UserError(f"{sys.executable}: other hosts' shells would not take this path: choose a plainer one")
        self.environment = environment
        _check(environment)
        self.way, self.hosts = _way(hosts, environment)
        self.names = list(self.hosts)
        meet = {"here": "127.0.0.1", "ssh": "", "slurm": self.names[0]}[self.way]  # "": found out on the way
        self.address = environment.get("MASTER_ADDR") or meet

    def start(self, directory: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> int:
        """Trains in the run `directory` with `python -m megalm.train ARGUMENTS` on all ranks; returns the exit code of
        what failed first, 0, or 128 and the number of the signal that ended the run. Nothing is left on any host."""
        passed = {} if self.way == "here" else _beginning(self.environment, PASSED_ON)
        with job(directory, arguments, {**passed, **variables}) as this, _noted() as asked:
            if self.way == "ssh":
                self._look(this)
            if asked:
                return 128 + asked[-1]
            launcher = subprocess.Popen(
                self._command(this),
                env=self._launchers_environment(this),
                cwd="/",  # which the launcher gives to the shells of all hosts
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process alone, which passes it on
                preexec_fn=end_with_parent,
            )
            said = Said()
            readers = [
                threading.Thread(target=self._read, args=(source, target, said), daemon=True)
                for source, target in ((launcher.stdout, sys.stdout), (launcher.stderr, sys.stderr))
            ]
            for reader in readers:
                reader.start()
            self._wait(launcher, this, said, asked)
            well = launcher.returncode == 0 and this.ended_well  # before others end well because nobody hears them
            self._end(launcher, this)
            for reader in readers:
                reader.join(10)
            return 0 if well and not asked else self._outcome(launcher.returncode, asked, said)

    def _command(self, this: Job) -> list[str]:
        port = self.environment.get("MASTER_PORT") or str(FIRST_PORT + random.randrange(PORTS))
        hostfile = this.folder / "hostfile"
        hostfile.write_text("".join(f"{name} slots={max(slots) + 1}\n" for name, slots in self.hosts.items()))
        include = "@".join(f"{name}:{','.join(map(str, slots))}" for name, slots in self.hosts.items())
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner"]
        options = [f"--hostfile={hostfile}", f"--include={include}", f"--master_addr={self.address}"]
        options += [f"--master_port={port}", "--log_level=error"]  # the launchers on the hosts do not heed it
        module = ["--module", "megalm.launch.job", this.word]
        if self.way == "here":
            return [*deepspeed, *options, "--no_ssh", "--node_rank=0", *module]
        if self.way == "ssh":
            return [*deepspeed, *options, "--no_ssh_check", "--force_multi", *module]
        nodes = [f"--nodes={len(self.names)}", "--ntasks-per-node=1", f"--nodelist={','.join(self.names)}"]
        shell = ["bash", "-c", 'exec "$0" "${@:1:2}" --node_rank="$SLURM_NODEID" "${@:3}"']
        return ["srun", "--label", "--overlap", *nodes, *shell, *deepspeed, *options, "--no_ssh", *module]

    def _launchers_environment(self, this: Job) -> dict[str, str]:
        if self.way == "here":
            return {**self.environment, "DS_ENV_FILE": f".none-{this.token}"}
        paths = {name: self.environment[name] for name in PATHS if name in self.environment}
        plain = {name: ":".join(p for p in path.split(":") if HARMLESS.fullmatch(p)) for name, path in paths.items()}
        ssh = " ".join([self.environment.get("PDSH_SSH_ARGS_APPEND", ""), *SSH]).strip()
        mine = {"DS_ENV_FILE": f".none-{this.token}", "PDSH_SSH_ARGS_APPEND": ssh}
        return {**_beginning(self.environment, LAUNCHERS), **plain, **mine}

    def _look(self, this: Job) -> None:
        """Whether each host can be reached and has what its ranks need; also finds out where the ranks meet."""
        python, folder = shlex.quote(sys.executable), shlex.quote(str(this.folder))
        script = (
            f"test -x {python} || echo {python}; test -r {folder}/job.json || echo {folder}; echo : $SSH_CONNECTION"
        )
        found = self._on_all(script, 30)
        away = [f"{name} ({_last(done.stderr)})" for name, done in found.items() if done.returncode]
        if away:
            raise UserError(
                f"cannot be reached by ssh without a password: {', '.join(away)}: correct the hostfile or that host's "
                "sshd and your key"
            )
        ends: dict[str, list[str]] = {}
        for name, done in found.items():
            missing, _, connection = done.stdout.rpartition(":")
            if missing.strip():
                raise UserError(
                    f"{name} does not have {missing.split()[0]}: the same Python must be on all hosts, and run.dir on "
                    "storage that they share"
                )
            ends[name] = connection.split()
        if not self.address:
            self.address = meeting_place(ends)

    def _wait(self, launcher: subprocess.Popen[bytes], this: Job, said: Said, asked: list[int]) -> None:
        """Until the launcher has ended, or must be. Passes on to the ranks what this process is asked."""
        deadline = again = float("inf")
        while launcher.poll() is None and (now := time.monotonic()) < deadline and asked.count(signal.SIGINT) < 2:
            if asked and (again == float("inf") or now > again):  # not all ranks may have begun to listen
                name = "USR1" if asked[-1] == signal.SIGUSR1 else "TERM"
                self._on_all(f"pkill -{name} -f 'job=[^ ]*{_hidden(this.token)}'; true", 30)
                deadline, again = min(deadline, now + TO_END), time.monotonic() + 5
            if said.host_failed.is_set():
                deadline = min(deadline, now + TO_SAY)
            time.sleep(0.2)

    def _end(self, launcher: subprocess.Popen[bytes], this: Job) -> None:
        """Ends all that is left of the job: connections, then what runs on the hosts, which is asked first."""
        if self.way != "here" or launcher.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        token = _hidden(this.token)
        wait = f"for i in $(seq 40); do pgrep -f {token} > /dev/null || exit 0; sleep 0.5; done"
        self._on_all(f"pkill -TERM -f {token}; {wait}; pkill -KILL -f {token}; true", 60)
        launcher.wait()

    def _on_all(self, script: str, timeout: float) -> dict[str, subprocess.CompletedProcess[str]]:
        """What the shell of each host makes of `script`."""
        with ThreadPoolExecutor(min(64, len(self.names))) as threads:
            done = threads.map(lambda name: self._on(name, script, timeout), self.names)
            return dict(zip(self.names, done, strict=True))

    def _on(self, name: str, script: str, timeout: float) -> subprocess.CompletedProcess[str]:
        command = {
            "here": ["sh", "-c", script],
            "ssh": ["ssh", *shlex.split(self.environment.get("PDSH_SSH_ARGS_APPEND", "")), *SSH, name, script],
            "slurm": ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={name}", "sh", "-c", script],
        }[self.way]
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 1, "", f"no answer within {timeout:.0f} s")

    def _read(self, source: IO[bytes], target: IO[str], said: Said) -> None:
        """Passes on what ranks say, without what the launchers say; keeps errors for the end."""
        for line in source:
            name, words = self._speaker(line.decode(errors="replace"))
            if failed := HOST_FAILED.match(words):
                if failed[2] == "255":  # ssh's own
                    said.deaths.append(f"the connection to {failed[1]} ended")
                said.host_failed.set()
            elif words.startswith(OURS):
                said.errors.append(words.removeprefix(OURS).strip())
            elif died := RANK_DIED.search(words):
                said.deaths.append(f"local rank {died[1]} on {name} was ended by {signal.Signals(int(died[2])).name}")
            elif not ITS_LOG.match(words):
                with suppress(BrokenPipeError):  # the reader has gone; the run goes on
                    print(words, end="", file=target, flush=True)

    def _speaker(self, line: str) -> tuple[str, str]:
        """The host that a line is from, and what it says: `pdsh` and `srun --label` put the one before the other."""
        label, _, words = line.partition(": ")
        if self.way == "ssh" and label in self.names:
            return label, words
        if self.way == "slurm" and label.strip().isdigit():
            return self.names[int(label)], words
        return self.names[0], line

    def _outcome(self, code: int, asked: list[int], said: Said) -> int:
        """Says why a run has not ended well; returns its exit code."""
        causes = said.errors if asked else [*said.errors, *said.deaths, f"the launcher ended before the run ({code})"]
        if causes:
            print(OURS + causes[0], file=sys.stderr)
        if asked:
            return 128 + asked[-1]
        if code > 192:  # a negative code, which DeepSpeed takes for a number
            return 128 + 256 - code
        return code if code > 0 else 1


def _check(environment: Mapping[str, str]) -> None:
    """Raises UserError for settings that ssh, or the ranks that meet, would stumble over."""
    try:
        shlex.split(environment.get("PDSH_SSH_ARGS_APPEND", ""))
    except ValueError as error:
        raise UserError(f"PDSH_SSH_ARGS_APPEND: {error}: correct the environment") from None
    port = environment.get("MASTER_PORT") or str(FIRST_PORT)
    if not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port[:40]} is no port: choose one from 1 to 65535")
    if address := environment.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            raise UserError(f"MASTER_ADDR={address}: {error}: name the first host, or leave it out") from None


def _way(hosts: Hosts, environment: Mapping[str, str]) -> tuple[Way, Hosts]:
    """How these hosts are reached, and they in the order in which that counts them."""
    if environment.get("SLURM_JOB_ID") and shutil.which("srun") and shutil.which("scontrol"):
        nodes = environment.get("SLURM_JOB_NODELIST", "")
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        allocated = shown.stdout.split()
        if others := [name for name in hosts if name not in allocated]:
            raise UserError(
                f"{', '.join(others)}: not among the nodes of Slurm's job {environment['SLURM_JOB_ID']} ({nodes}): "
                "correct the hostfile"
            )
        return "slurm", {name: hosts[name] for name in allocated if name in hosts}
    if len(hosts) == 1 and is_here(next(iter(hosts))):
        return "here", hosts
    if missing := [tool for tool in ("pdsh", "ssh") if shutil.which(tool) is None]:
        raise UserError(
            f"{', '.join(hosts)}: other hosts are reached with pdsh and ssh; there is no {missing[0]} here: install it"
        )
    return "ssh", hosts


def is_here(name: str) -> bool:
    """Whether a host name means this machine: only its own addresses can be listened on."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], address[1]) as trial:
            trial.bind(address[4])
    except OSError:
        return False
    return True


def meeting_place(ends: Mapping[str, Sequence[str]]) -> str:
    """The first host's address on the hosts' network, from each ssh connection's two ends: `client port server port`.
    Where the first host is this one, and reaches itself by a loopback, another host knows its address."""
    first, *others = ends.values()
    if not ipaddress.ip_address(first[2]).is_loopback or not others:
        return first[2]
    return others[0][0]


def _beginning(environment: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(names)}


def _hidden(token: str) -> str:
    """A pattern that means `token` and is not found by itself in the command line of who searches for it."""
    return f"[{token[0]}]{token[1:]}"


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no answer"


@contextmanager
def _noted() -> Iterator[list[int]]:
    """While inside, signals that ask a run to end are noted in the list."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as nohup leaves SIGHUP
    former = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
