"""Two hosts on one machine: each with its own network, name and processes, and an sshd; they share the files.

    with Hosts(folder) as hosts:
        hosts.start("node1", "pdsh", "-R", "ssh", "-w", "node1,node2", "hostname")
        hosts.cut("node2")                    # a partition; hosts.mend("node2")

           bridge
          /      \\
    node1 eth0   node2 eth0        each a network namespace, and below it those of names, mounts and processes, whose
      sshd         sshd            first process takes all others with it when it is killed, as a power failure would

Needs root, `ip` (iproute2), `unshare` and `nsenter` (util-linux), `sshd` and `ssh`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

TOOLS = ("ip", "ss", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh", "pkill")
SSHD = """Port 22
ListenAddress {address}
HostKey {folder}/hostkey
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH = """Host *
  IdentityFile ~/.ssh/key
  StrictHostKeyChecking yes
  LogLevel ERROR
"""


def needed() -> str:
    """What is missing for a cluster here; empty if all is there."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}: make cluster"
    # A container may be root without the right to make networks.
    trial = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return "" if trial.returncode == 0 else "may not make namespaces here"


class Hosts:
    """While entered, the hosts node1 and node2 run; all that ran on them is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, ("node1", "node2")
        self._mark = f"{os.getpid() % 0xFFFF:x}"  # several clusters may be up at a time
        self._network = f"10.77.{os.getpid() % 250}"
        self._groups = folder / "cgroup"
        self._inits: dict[str, psutil.Process] = {}
        self._outer: list[subprocess.Popen[bytes]] = []

    def address(self, name: str) -> str:
        return f"{self._network}.{self.names.index(name) + 1}"

    def _space(self, name: str) -> str:
        return f"mg{self._mark}-{name}"

    def __enter__(self) -> Hosts:
        try:
            self._keys()
            self._groups.mkdir()  # a second place for the control groups: Slurm needs them, `ip netns exec` hides them
            subprocess.run(["mount", "--rbind", "--make-rslave", "/sys/fs/cgroup", self._groups], check=True)
            bridge = f"mgbr{self._mark}"
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for name in self.names:
                self._network_of(name, bridge)
            for name in self.names:
                self._boot(name)
            self._wait_for_sshd()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _keys(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's, kept empty
        (self.folder / "ssh").mkdir(mode=0o700, parents=True)
        for key in ("hostkey", "ssh/key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        shutil.copy(self.folder / "ssh/key.pub", self.folder / "key.pub")
        public = " ".join((self.folder / "hostkey.pub").read_text().split()[:2])
        known = [f"{name},{self.address(name)} {public}\n" for name in self.names]
        (self.folder / "ssh/known_hosts").write_text("".join(known))
        (self.folder / "ssh/config").write_text(SSH)
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        for name in self.names:  # `ip netns exec` lays this over /etc/hosts
            own = Path("/etc/netns") / self._space(name)
            own.mkdir(parents=True)
            (own / "hosts").write_text("\n".join(lines) + "\n")
            conf = SSHD.format(address=self.address(name), folder=self.folder)
            (self.folder / f"sshd-{name}").write_text(conf)

    def _network_of(self, name: str, bridge: str) -> None:
        space, link = self._space(name), f"mg{self._mark}v{name[-1]}"
        _ip("netns", "add", space)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", bridge, "up")
        _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", space, "link", "set", device, "up")

    def _boot(self, name: str) -> None:
        script = (
            f"hostname {name} && mkdir -p /root/.ssh && mount --bind {self.folder}/ssh /root/.ssh && "
            f"mount --rbind {self._groups} /sys/fs/cgroup; "
            f"$(command -v sshd) -D -e -f {self.folder}/sshd-{name} & while true; do wait; sleep 1; done"
        )
        inner = ["unshare", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script]
        with (self.folder / f"{name}.log").open("wb") as log, open(os.devnull, "rb") as nothing:
            # If the tests are killed, the host goes with them.
            command = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._space(name), *inner]
            outer = subprocess.Popen(command, stdin=nothing, stdout=log, stderr=log, start_new_session=True)
        self._outer.append(outer)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            first = [child for child in psutil.Process(outer.pid).children() if child.name() == "bash"]
            if first:
                self._inits[name] = first[0]
                return
            time.sleep(0.05)
        pytest.fail(f"{name} did not start: {(self.folder / f'{name}.log').read_text()}")

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + 60
        for name in self.names:
            while self.run("node1", "ssh", name, "true").returncode:
                if time.monotonic() > deadline:
                    pytest.fail(f"{name}'s sshd does not answer: {(self.folder / f'{name}.log').read_text()}")
                time.sleep(0.2)

    def command(self, name: str, *words: str, cwd: str | Path = "/") -> list[str]:
        """What runs `words` on a host."""
        enter = ["nsenter", "-t", str(self._inits[name].pid), "-m", "-u", "-n", "-p", f"--wd={cwd}", "--"]
        return [*enter, *words]

    def run(self, name: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(name, *words), capture_output=True, text=True, timeout=120, **more)

    def start(self, name: str, *words: str, **more: Any) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = self.command(name, *words, cwd=more.pop("cwd", "/"))
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, **more)

    def processes(self, name: str, word: str) -> list[psutil.Process]:
        """What runs on a host and has `word` in its command line, seen from outside."""
        found = []
        for process in self._inits[name].children(recursive=True) + _in_space_of(self._inits[name]):
            try:
                if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return list(dict.fromkeys(found))

    def cut(self, name: str) -> None:
        _ip("-n", self._space(name), "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        _ip("-n", self._space(name), "link", "set", "eth0", "up")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for init in self._inits.values():
            init.send_signal(signal.SIGKILL)
        for outer in self._outer:
            outer.kill()
            outer.wait()
        subprocess.run(["umount", "--recursive", "--lazy", self._groups], capture_output=True)
        for name in self.names:
            space = self._space(name)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
        subprocess.run(["ip", "link", "del", f"mgbr{self._mark}"], capture_output=True)


@contextmanager
def made(*clusters: AbstractContextManager[Any]) -> Iterator[Any]:
    """Enters them, gives the last, and skips the test where this machine does not let them be: a container may be root
    and may still not make networks or mounts."""
    with ExitStack() as stack:
        try:
            entered = [stack.enter_context(cluster) for cluster in clusters]
        except (OSError, subprocess.SubprocessError, pytest.fail.Exception) as error:
            pytest.skip(f"no cluster can be made here: {error}")
        yield entered[-1]


def _in_space_of(init: psutil.Process) -> list[psutil.Process]:
    """Those that were brought in from outside and so are nobody's children there."""
    space = os.readlink(f"/proc/{init.pid}/ns/pid")
    found = []
    for process in psutil.process_iter():
        try:
            if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                found.append(process)
        except OSError:
            continue
    return found


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
