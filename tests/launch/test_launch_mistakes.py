"""What a user can get wrong about hosts, environments and command lines: exit code 2 and one line that says what."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import write_config

from megalm.cli import main

RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "7",
}  # fmt: skip
GOOD = "node1 slots=2\nnode2 slots=2\n"
ON = ["launch", "CONFIG", "--hostfile", "HOSTS"]

HOSTFILES = [
    ("", "names no host"),
    ("# node1 slots=2\n\n", "names no host"),
    ("node1\n", "hosts:1: no number of processes after node1"),
    ("node1 slots\n", "no number of processes after node1"),
    ("node1 slots=\n", "no number of processes after node1"),
    ("node1 slots=two\n", "no number of processes after node1"),
    ("node1 slots=-1\n", "no number of processes after node1"),
    ("node1 slots=2x\n", "no number of processes after node1"),
    ("node1 slots = 2\n", "no number of processes after node1"),
    ("node1:2\n", "'node1:2' is no host name"),
    ("slots=2\n", "'slots=2' is no host name"),
    ("node[1-2] slots=2\n", "'node[1-2]' is no host name"),
    ("-oProxyCommand=x slots=2\n", "'-oProxyCommand=x' is no host name"),
    ("$(reboot) slots=2\n", "'$(reboot)' is no host name"),
    ("me@node1 slots=2\n", "'me@node1' is no host name"),
    ("node1 slots=2\nnode2 slots=0\n", "hosts:2: node2 has slots=0"),
    ("node1 slots=2\nnode2 slots=1000000000\n", "hosts:2: node2 has slots=1000000000: a host runs at most 65536"),
    (f"node1 slots={'9' * 5000}\n", "hosts:1: node1 has slots=9"),
    ("node1 slots=2\n\nnode1 slots=4\n", "hosts:3: node1 is named twice"),
    ("node1 slots=2\nnode1 slots=2 # again\n", "hosts:2: node1 is named twice"),
]
VARIABLES = [
    ("NCCL_DEBUG\n", ".deepspeed_env:1: is no NAME=value"),
    ("A=1\n\nexport B=2\n", ".deepspeed_env:3: is no NAME=value"),
    ("=x\n", ".deepspeed_env:1: is no NAME=value"),
    ("A B=1\n", ".deepspeed_env:1: is no NAME=value"),
    ("$(id)=1\n", ".deepspeed_env:1: is no NAME=value"),
    ("A=1\nRANK=3\n", ".deepspeed_env:2: RANK is not the same for all ranks"),
    ("MASTER_ADDR=node1\n", ".deepspeed_env:1: MASTER_ADDR is not"),
    ("CROSS_RANK=0\n", ".deepspeed_env:1: CROSS_RANK is not"),
    ("A=x\0y\n", "has a NUL in it"),
    ("HF_TOKEN=hush\n", "holds HF_TOKEN and may be read by others: chmod 600"),
]
COMMANDS = [
    (["launch", "CONFIG"], "on which hosts?"),
    (["launch"], "CONFIG"),
    (["launch", "CONFIG", "--hostfile", "nowhere"], "nowhere: no such file"),
    (["launch", "CONFIG", "--hostfile", "."], "is a directory"),
    ([*ON, "--include", "node3"], "the hostfile has no 'node3'"),
    ([*ON, "--include", "node1:2"], "node1 has no process '2': 0 to 1"),
    ([*ON, "--include", "node1:"], "node1 has no process ''"),
    ([*ON, "--include", "node1:-1"], "node1 has no process '-1'"),
    ([*ON, "--include", "node1:0:1"], "node1 has no process '0:1'"),
    ([*ON, "--include", "node1,node2"], "the hostfile has no 'node1,node2'"),
    ([*ON, "--include", "node1@"], "the hostfile has no ''"),
    ([*ON, "--exclude", "nod1"], "Did you mean 'node1'?"),
    ([*ON, "--exclude", "node1@node2"], "leaves no host"),
    ([*ON, "--include", "node1", "--exclude", "node2"], "only one of them can be given"),
    ([*ON, "--nodes", "2"], "--nodes=2: is for --slurm"),
    ([*ON, "--slurm", "--nodes", "2"], "Slurm chooses the hosts"),
    ([*ON, "--max-restarts", "-1"], "--max-restarts"),
    ([*ON, "--max-restarts", "often"], "--max-restarts"),
    ([*ON, "--hosts", "x"], "No such option"),
    ([*ON, "parallel.tensor=3"], "parallel.tensor=3 does not divide this run's 4 processes"),
    ([*ON, "parallel.tensr=2"], "parallel.tensr"),
    ([*ON, ""], "is empty"),
    (["launch", "CONFIG", "--slurm"], "on how many nodes?"),
    (["train", "CONFIG", "--nproc", "0"], "--nproc"),
    (["train", "CONFIG", "--nproc", "2", "parallel.tensor=4"], "needs at least 4 processes"),
    (["train", "CONFIG", "--max-restarts", "-1"], "--max-restarts"),
]
ENVIRONMENTS = [
    *[({k: v for k, v in RANKS.items() if k != name}, f"{name} is not set, although") for name in RANKS],
    *[({k: v for k, v in STEP.items() if k != name}, f"{name} is not set") for name in STEP if "TASKS" not in name],
    ({**RANKS, "RANK": "2"}, "rank 2 of 2 processes"),
    ({**RANKS, "LOCAL_RANK": "7"}, "local rank 7 of 2 processes"),
    ({**RANKS, "RANK": "9" * 5000}, "is no whole number"),
    ({**RANKS, "WORLD_SIZE": "0"}, "rank 0 of 0 processes"),
    ({**RANKS, "MASTER_PORT": "http"}, "MASTER_PORT=http is no whole number"),
    ({**RANKS, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ({**RANKS, "LOCAL_RANK": "first"}, "LOCAL_RANK=first is no whole number"),
    ({**RANKS, "MASTER_ADDR": "192.0.2.1"}, "MASTER_ADDR=192.0.2.1: is no address of rank 0's host"),
]


ON_HOSTS = [
    ({"PDSH_SSH_ARGS_APPEND": "-o 'x"}, "PDSH_SSH_ARGS_APPEND: No closing quotation"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
    ({"MASTER_PORT": "9" * 5000}, "is no port"),
    ({"MASTER_ADDR": "no such"}, "MASTER_ADDR=no such: "),
]


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Gives the one line with which a command line is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = write_config(tmp_path, tmp_path / "run")
    (tmp_path / "hosts").write_text(GOOD)

    def run(arguments: list[str]) -> str:
        words = {"CONFIG": config, "HOSTS": str(tmp_path / "hosts")}
        assert main([words.get(argument, argument) for argument in arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("megalm: error: ")
        assert said.err.count("\n") == 1
        assert "hush" not in said.err
        assert not (tmp_path / "run").exists()
        return said.err

    return run


@pytest.mark.parametrize(("text", "wrong"), HOSTFILES)
def test_a_wrong_hostfile_is_refused_with_its_line(say, tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / "hosts").write_text(text)
    assert wrong in say(ON)


@pytest.mark.parametrize(("text", "wrong"), VARIABLES)
def test_a_wrong_file_of_variables_is_refused_with_its_line(say, tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / ".deepspeed_env").write_text(text)
    assert wrong in say(ON)


@pytest.mark.parametrize(("arguments", "wrong"), COMMANDS)
def test_a_wrong_command_line_is_refused(say, arguments: list[str], wrong: str) -> None:
    assert wrong in say(arguments)


@pytest.mark.parametrize(("environment", "wrong"), ENVIRONMENTS)
def test_a_wrong_environment_is_refused(say, monkeypatch, environment: dict[str, str], wrong: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wrong in say(["train", "CONFIG"])


@pytest.mark.parametrize(("environment", "wrong"), ON_HOSTS)
def test_a_wrong_setting_for_hosts_is_refused(say, monkeypatch, environment: dict[str, str], wrong: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wrong in say([*ON, "batch.micro_size=1"])


def test_neither_launching_nor_restarts_are_for_a_rank_of_another_launcher(say, monkeypatch) -> None:
    for name, value in RANKS.items():
        monkeypatch.setenv(name, value)
    assert "use megalm train in its place" in say(ON)
    assert "another launcher has started 2 processes" in say(["train", "CONFIG", "--max-restarts", "2"])


def test_hosts_that_cannot_be_reached_or_lack_something_are_named(say, tmp_path: Path, monkeypatch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    answers = "case $* in *' node2 '*) {};; *) echo ': 10.0.0.1 5 10.0.0.1 22';; esac\n"
    for name, does in (("pdsh", "exit 9\n"), ("ssh", answers.format("echo No route to host >&2; exit 255"))):
        (tools / name).write_text(f"#!/bin/sh\n{does}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    assert "cannot be reached by ssh without a password: node2 (No route to host)" in say([*ON, "batch.micro_size=1"])
    (tools / "ssh").write_text(f"#!/bin/sh\n{answers.format('echo /opt/python; echo :')}")
    assert "node2 does not have /opt/python" in say([*ON, "batch.micro_size=1"])
    assert [path.name for path in tmp_path.glob(".*launch*")] == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert "there is no pdsh here" in say([*ON, "batch.micro_size=1"])
