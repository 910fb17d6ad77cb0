"""A run over two hosts, through `megalm launch` and DeepSpeed's own launcher, and its end when something dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import Hosts, made, needed
from runs import losses, write_config

from megalm.cli import main
from megalm.launch.restarts import last_step

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.skipif(bool(needed()), reason=needed())]

PYTHON = [sys.executable, "-m"]
LAYOUT = ["parallel.tensor=2", "parallel.pipeline={size: 2, schedule: zbv}", "model.num_layers=4", "run.timeout=20.0"]
LONG = [*LAYOUT, "schedule.steps=100000", "checkpoint.every=5"]
SHORT = [*LAYOUT, "schedule={steps: 4}"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with made(Hosts(tmp_path_factory.mktemp("hosts") / "two")) as two:
        yield two


@pytest.fixture
def start(hosts: Hosts, data: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command on node1 with a hostfile of both hosts; nothing of it is left on them afterwards."""
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.Popen[str]:
        return hosts.start("node1", *words, env=environment, cwd=tmp_path)

    yield run
    for name in hosts.names:
        for process in hosts.processes(name, str(tmp_path)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def launch(config: str, *more: str) -> list[str]:
    return [*PYTHON, "megalm", "launch", config, "--hostfile", "hosts", *more]


def ranks(hosts: Hosts, name: str) -> list[psutil.Process]:
    found = [process for process in hosts.processes(name, "megalm.train") if "launcher" not in process.cmdline()[3]]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


def reach(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Waits until a run has made so many steps."""
    deadline = time.monotonic() + 400
    while last_step(run) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"step {step} was not reached: {process.communicate()}")
        time.sleep(0.1)


def finish(hosts: Hosts, process: subprocess.Popen[str], within: float) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that must end in so many seconds, with all that it started."""
    out, errors = process.communicate(timeout=within)
    deadline = time.monotonic() + 60
    while left := [p.cmdline() for name in hosts.names for p in hosts.processes(name, "megalm")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    return process.returncode, out, errors


def said(errors: str) -> str:
    """The one error that was said."""
    [error] = [line for line in errors.splitlines() if line.startswith("megalm: error: ")]
    return error


def test_both_launchers_train_over_two_hosts_what_one_process_trains(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path
) -> None:
    ours, theirs, alone = tmp_path / "it's $(touch touched) ours", tmp_path / "theirs", tmp_path / "alone"
    process = start(*launch(write_config(data, ours), *SHORT, "optimizer.learning_rate=3.0e-3 # $(touch touched) '\""))
    code, out, errors = finish(hosts, process, 400)
    assert code == 0, errors
    assert "step 4: loss" in out
    assert "launch.py" not in out + errors
    bare = [*PYTHON, "deepspeed.launcher.runner", "--hostfile=hosts", "--module", "megalm.train"]
    code, out, errors = finish(hosts, start(*bare, write_config(data, theirs), *SHORT), 400)
    assert code == 0, errors
    assert not list(tmp_path.rglob("touched"))
    assert main(["train", write_config(data, alone), "model.num_layers=4", "schedule={steps: 4}"]) == 0
    for run in (ours, theirs):
        for (_, *line), (_, *wanted) in zip(losses(run), losses(alone), strict=True):
            assert line == pytest.approx(wanted, rel=1e-5)


def test_a_killed_rank_is_named_and_the_run_starts_again(hosts: Hosts, start: Any, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*launch(write_config(data, run), *LAYOUT, "schedule={steps: 40}", "--max-restarts", "1"))
    reach(process, run, 12)
    ranks(hosts, "node2")[1].kill()
    code, _, errors = finish(hosts, process, 600)
    assert "rank 3 (node2) no longer answers" in said(errors)
    assert code == 0
    assert "continuing from" in (run / "train.log").read_text()
    assert losses(run)[-1][0] == 40


def test_a_launcher_whose_pdsh_was_killed_fails_and_the_ranks_save_and_end(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path
) -> None:
    """They have a secret that only they know, and listen on their own network."""
    run, secret = tmp_path / "run", "hu sh$(touch touched)"
    (tmp_path / ".deepspeed_env").write_text(f"\n# ours\nWANDB_API_KEY={secret}\n")
    (tmp_path / ".deepspeed_env").chmod(0o600)
    process = start(*launch(write_config(data, run), *LONG))
    reach(process, run, 7)
    assert {p.environ().get("WANDB_API_KEY") for name in hosts.names for p in ranks(hosts, name)} == {secret}
    heard = hosts.run("node1", "ss", "--listening", "--tcp", "--numeric", "--no-header", "--processes").stdout
    assert {line.split()[3].rpartition(":")[0] for line in heard.splitlines() if "python" in line} == {
        hosts.address("node1")
    }
    [pdsh] = [process for process in hosts.processes("node1", "pdsh") if process.name().startswith("pdsh")]
    pdsh.kill()
    code, out, errors = finish(hosts, process, 200)
    assert code == 1
    assert "hu sh" not in out + errors
    assert not list(tmp_path.rglob("touched"))
    assert "the launcher ended before the run" in said(errors)
    assert (run / "checkpoints" / f"step-{losses(run)[-1][0]:08d}").is_dir()


@pytest.mark.full
@pytest.mark.parametrize("victim", ["launch", "deepspeed.launcher.runner", "deepspeed.launcher.launch"])
def test_nothing_is_left_when_a_launcher_is_killed(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    process = start(*launch(write_config(data, run), *LONG))
    reach(process, run, 7)
    found = [p for p in hosts.processes("node1", victim) if victim in p.cmdline() and p.name().startswith("python")]
    found[0].kill()
    code, *_ = finish(hosts, process, 200)
    assert code != 0
    assert not list(tmp_path.glob(".*launch*"))


@pytest.mark.full
@pytest.mark.parametrize("ours", [True, False])
def test_a_rank_that_is_stopped_or_killed_is_named_whoever_launched(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path, ours: bool
) -> None:
    run = tmp_path / "run"
    bare = [*PYTHON, "deepspeed.launcher.runner", "--hostfile=hosts", "--module", "megalm.train"]
    plain = ["parallel.data=4", "batch.micro_size=2", "run.timeout=20.0", "schedule.steps=100000"]
    config = write_config(data, run)
    process = start(*(launch(config, *LONG) if ours else [*bare, config, *plain]))
    reach(process, run, 7)
    ranks(hosts, "node2")[0].send_signal(signal.SIGSTOP if ours else signal.SIGKILL)
    code, out, errors = finish(hosts, process, 300)
    assert code not in (0, 2)
    assert "rank 2 (node2) no longer answers" in (said(errors) if ours else out + errors)


@pytest.mark.full
def test_hosts_that_are_cut_off_from_each_other_end_by_themselves(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*launch(write_config(data, run), *LONG))
    reach(process, run, 7)
    hosts.cut("node2")
    try:
        code, _, errors = finish(hosts, process, 300)
    finally:
        hosts.mend("node2")
    assert code not in (0, 2)
    assert "node2" in said(errors)


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_to_the_launcher_is_passed_on_and_the_ranks_save(
    hosts: Hosts, start: Any, data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    process = start(*launch(write_config(data, run), *LONG))
    reach(process, run, 7)
    [launcher] = [p for p in hosts.processes("node1", "launch") if p.cmdline()[1:4] == ["-m", "megalm", "launch"]]
    launcher.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == code
    assert (run / "checkpoints" / f"step-{losses(run)[-1][0]:08d}").is_dir()
    assert (run / "stopped").exists()


def test_a_host_that_cannot_be_reached_is_named(hosts: Hosts, start: Any, data: Path, tmp_path: Path) -> None:
    process = start(*launch(write_config(data, tmp_path / "run"), "batch.micro_size=2"))
    hosts.cut("node2")
    try:
        code, _, errors = finish(hosts, process, 200)
    finally:
        hosts.mend("node2")
    assert code == 2
    assert "cannot be reached by ssh without a password: node2 (" in said(errors)
