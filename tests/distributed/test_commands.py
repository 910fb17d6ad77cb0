"""Runs of several processes through the real commands: layouts, kills, stops, differences, mistakes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from runs import losses, over, read_metrics, wait_for_step, write_config

from megalm.cli import main
from megalm.launch.world import GONE
from megalm.parallel.pipeline.timeline import read_timeline

SETTINGS = ["schedule={steps: 24}", "model.num_heads=4", "optimizer.eps=1.0e-5", "run.timeout=20.0"]
FOUR = ["parallel.tensor=2", "parallel.pipeline={size: 2, schedule: zbv}", "model.num_layers=4"]
OTHER = ["parallel.data=2", "parallel.zero.stage=3", "model.num_layers=4", "batch.micro_size=2"]


def command(config: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "megalm.train", config, *SETTINGS, *arguments]


def started(config: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(config, *arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", **environment},
    )


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that an agent has started, in the order of their ranks."""
    found = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in found if "megalm.train" in " ".join(child.cmdline())]
    return sorted(ranks, key=lambda child: int(child.environ()["RANK"]))


def heard_at(processes: list[psutil.Process]) -> set[str]:
    """Where processes listen."""
    found = [connection for process in processes for connection in process.net_connections("tcp")]
    return {connection.laddr.ip for connection in found if connection.status == psutil.CONN_LISTEN}


def free_port() -> int:
    """Below those that the system gives to clients, of which the other ranks are some."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("localhost", port))
            return port
    pytest.fail("no port is free")


def by_hand(config: str, *arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """One process a list of arguments, which find each other without an agent."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(len(arguments)), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [
        started(config, *more, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank, more in enumerate(arguments)
    ]


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    yield
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "megalm.train" in process.cmdline():
                process.kill()


def outcome(process: subprocess.Popen[bytes], timeout: float = 280) -> tuple[int, list[str]]:
    """Exit code, and the errors that were said."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, [line for line in errors.decode().splitlines() if line.startswith("megalm: error")]


def test_a_killed_run_goes_on_under_another_layout_with_the_same_losses(data: Path, tmp_path: Path) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert main(["train", write_config(data, alone), *SETTINGS, "model.num_layers=4"]) == 0
    config = write_config(data, several)
    process = started(config, "--nproc", "4", *FOUR, "log.timeline=true")
    wait_for_step(process, several, 12)
    for rank in ranks_of(process):
        rank.kill()
    process.kill()
    process.wait()
    assert 5 <= read_metrics(several)[-1]["step"] < 24
    assert read_timeline(several / "timeline.json").layers == (1, 1, 1, 1)
    planned = f"parallel.pipeline={{size: 2, schedule: auto, costs_from: {several}}}"
    assert outcome(started(config, "--nproc", "4", *OTHER, planned)) == (0, [])
    ours, theirs = losses(several), losses(alone)
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    for (step, *line), (_, *wanted) in zip(ours, theirs, strict=True):
        assert line == pytest.approx(wanted, rel=1e-5), f"step {step}"
    assert [m.get("data_hash") for m in read_metrics(several)] == [m.get("data_hash") for m in read_metrics(alone)]
    assert main(["generate", str(several), "--prompt", "a: number", "--max-new-tokens", "5"]) == 0


def lonely(data: Path, run: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The first rank of two, whose second never comes."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    return started(write_config(data, run), *arguments, **place, MASTER_PORT=str(free_port()))


def test_a_rank_that_never_comes_is_named_after_the_timeout(data: Path, tmp_path: Path) -> None:
    code, [error] = outcome(lonely(data, tmp_path / "run", "run.timeout=3"))
    assert (code, error) == (2, "megalm: error: rank 1 of 2 did not start within 3 s: see what it says")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_waits_for_others_hears_a_signal(data: Path, tmp_path: Path) -> None:
    process = lonely(data, tmp_path / "run", "run.timeout=3000")
    while not heard_at([psutil.Process(process.pid)]):  # it keeps the store
        time.sleep(0.1)
    process.terminate()
    code, [error] = outcome(process)
    assert (code, error) == (1, "megalm: error: rank 0: asked to stop while it waited for the other ranks")


def test_ranks_end_when_the_one_that_keeps_their_store_is_stopped(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = by_hand(write_config(data, run), *[["schedule.steps=100000"]] * 2)
    wait_for_step(processes[0], run, 3)
    os.kill(processes[0].pid, signal.SIGSTOP)
    code, [error] = outcome(processes[1])
    assert (code, error) == (1, f"megalm: error: rank 1: {GONE}")
    processes[0].kill()
    processes[0].wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_the_run_and_is_named(
    data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    processes = by_hand(
        write_config(data, run), *[["parallel.data=3", "batch.global_size=9", "batch.micro_size=3"]] * 3
    )
    wait_for_step(processes[0], run, 3)
    os.kill(processes[1].pid, number)
    begun = time.monotonic()
    code, errors = outcome(processes[0])
    assert (code, outcome(processes[2])) == (1, (1, []))
    assert time.monotonic() - begun < 60
    processes[1].kill()
    processes[1].wait()
    [error] = errors
    assert error.startswith(f"megalm: error: rank 1 ({socket.gethostname()}) no longer answers")


@pytest.mark.parametrize(("number", "ends_with"), [(signal.SIGKILL, 128 + 9), (signal.SIGTERM, 0)])
def test_a_rank_that_is_killed_fails_the_command_and_one_that_is_asked_to_stop_does_not(
    data: Path, tmp_path: Path, number: signal.Signals, ends_with: int
) -> None:
    run = tmp_path / "run"
    process = started(write_config(data, run), "parallel.tensor=2", "schedule.steps=100000")
    wait_for_step(process, run, 3)
    assert heard_at([psutil.Process(process.pid), *ranks_of(process)]) == {"127.0.0.1"}
    ranks_of(process)[1].send_signal(number)
    code, errors = outcome(process)
    assert code == ends_with
    if code:
        assert re.search(r"error: rank 1 \(process \d+\) was ended by SIGKILL", errors[-1])
    else:
        assert errors == []
        assert any((run / "checkpoints").iterdir())


def test_a_signal_in_a_ranks_first_moments_is_heard_later(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    [process] = by_hand(write_config(data, run), ["schedule.steps=100000"])
    status, held = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGUSR1 - 1)
    deadline = time.monotonic() + 60
    while not int(re.search(r"SigBlk:\t(\w+)", status.read_text())[1], 16) & held:  # type: ignore[index]
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGUSR1)
    assert outcome(process) == (0, [])
    assert "SIGUSR1 after step 1 of 100000" in (run / "stopped").read_text()


def test_a_rank_with_another_config_is_named_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    batch = "batch.micro_size=2"
    processes = by_hand(write_config(data, run), [batch], [batch], [batch, "optimizer.learning_rate=0.5"], [batch])
    ends = [outcome(process) for process in processes]
    assert [code for code, _ in ends] == [2] * 4
    [error] = ends[0][1]
    assert "rank 2" in error
    assert "has another config than 3 of 4 ranks: learning_rate: 0.5 instead of learning_rate: 0.003" in error
    assert [errors for _, errors in ends[1:]] == [[]] * 3
    assert not run.exists()


def test_a_mistake_is_said_once_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(data, run)
    ends = [outcome(process) for process in by_hand(config, *[["parallel.tensor=3"]] * 2)]
    assert [code for code, _ in ends] == [2, 2]
    assert "parallel.tensor=3 needs at least 3 processes" in ends[0][1][0]
    assert ends[1][1] == []
    process = started(config, "--nproc", "2", "parallel.tensor=2", "model.ffn_size=63")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith(b"megalm: error: parallel.tensor=2 does not divide model.ffn_size=63")
    assert errors.count(b"\n") == 1
    assert not run.exists()


def test_what_only_one_rank_cannot_find_is_said_with_its_name(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ends = [outcome(p) for p in by_hand(write_config(data, run), [], ["data.sources.0.path=nowhere"])]
    assert [code for code, _ in ends] == [2, 2]
    assert "rank 1" in ends[0][1][0]
    assert "nowhere" in ends[0][1][0]
    assert ends[1][1] == []


def test_a_signal_to_one_rank_stops_all_after_the_same_step(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = by_hand(write_config(data, run), *[["schedule.steps=5000"]] * 2)
    wait_for_step(processes[0], run, 3)
    assert heard_at([psutil.Process(process.pid) for process in processes]) <= {"127.0.0.1", "::1"}
    processes[1].send_signal(signal.SIGTERM)
    assert [outcome(process) for process in processes] == [(0, [])] * 2
    last = read_metrics(run)[-1]["step"]
    assert last < 5000
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert f"a signal to another rank, or its time limit: stopped after step {last}" in (run / "train.log").read_text()


def test_a_run_that_diverges_ends_all_ranks_with_one_line(data: Path, tmp_path: Path) -> None:
    overrides = ["optimizer={learning_rate: 1.0e+30, clip_norm: null}", "schedule.warmup_steps=0", "parallel.tensor=2"]
    ends = [outcome(p) for p in by_hand(write_config(data, tmp_path / "run"), *[overrides] * 2)]
    assert [code for code, _ in ends] == [2, 2]
    assert "training has diverged" in ends[0][1][0]
    assert ends[1][1] == []


@pytest.mark.timeout(900)
def test_a_run_starts_again_by_itself_after_a_rank_was_killed_and_goes_on_bit_for_bit(
    data: Path, tmp_path: Path
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    layout = ["parallel.data=2", "parallel.zero.stage=2"]
    assert outcome(started(write_config(data, alone), *layout)) == (0, [])
    process = started(write_config(data, killed), "--max-restarts", "1", *layout)
    wait_for_step(process, killed, 12)
    ranks_of(process)[1].kill()
    code, errors = outcome(process)
    assert code == 0
    assert errors != []
    assert all("rank 1 " in error for error in errors)
    assert losses(killed) == losses(alone)
    assert "continuing from" in (killed / "train.log").read_text()


@pytest.mark.parametrize("launched", [False, True])
def test_ranks_whose_agent_or_launcher_was_killed_save_and_end(data: Path, tmp_path: Path, launched: bool) -> None:
    if launched:
        pytest.importorskip("deepspeed")
    run, hosts = tmp_path / "run", tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    keys = ["parallel.tensor=2", "schedule.steps=100000", "checkpoint.every=100000", "run.device=cpu"]
    process = (
        started(write_config(data, run), *keys)
        if not launched
        else subprocess.Popen(
            [
                sys.executable,
                "-m",
                "megalm",
                "launch",
                write_config(data, run),
                *SETTINGS,
                *keys,
                "--hostfile",
                str(hosts),
            ],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
    )
    wait_for_step(process, run, 3)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    deadline = time.monotonic() + 200
    while not all(over(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    last = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert list(tmp_path.glob(".*launch*")) == []


@pytest.mark.timeout(900)
def test_deepspeeds_launcher_starts_a_run_by_itself_and_through_ours(data: Path, tmp_path: Path) -> None:
    """Ours takes what theirs would have read with a shell as it is, and shows nothing of it."""
    pytest.importorskip("deepspeed")
    theirs, ours, alone = tmp_path / "theirs", tmp_path / "it's $(touch touched) ours", tmp_path / "alone"
    steps = ["schedule={steps: 2}", "run.device=cpu"]
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("\n# secret\nWANDB_API_KEY=hu sh$(touch touched)\n")
    (tmp_path / ".deepspeed_env").chmod(0o600)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_ENV_FILE": "none", "PYTHONPATH": str(Path.cwd())}
    place = ["--no_ssh", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={tmp_path / 'hosts'}", *place]
    bare = [*runner, "--module", "megalm.train", write_config(data, theirs), *steps]
    assert subprocess.run(bare, env=environment, cwd=tmp_path, timeout=280, capture_output=True).returncode == 0
    del environment["DS_ENV_FILE"]
    config = [write_config(data, ours), *steps, "optimizer.learning_rate=3.0e-3 # $(touch touched) `id` '\""]
    megalm = [sys.executable, "-m", "megalm", "launch", *config, "--hostfile", "hosts"]
    done = subprocess.run(megalm, env=environment, cwd=tmp_path, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout
    assert "launch.py" not in done.stdout + done.stderr
    assert "hu sh" not in done.stdout + done.stderr
    assert not (tmp_path / "touched").exists()
    assert list(tmp_path.glob(".*launch*")) == []
    assert main(["train", write_config(data, alone), *steps]) == 0
    for run in (theirs, ours):
        for (_, *line), (_, *wanted) in zip(losses(run), losses(alone), strict=True):
            assert line == pytest.approx(wanted, rel=1e-5)


def test_torchrun_starts_a_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megalm.train"]
    config = [write_config(data, run), "schedule={steps: 2}", "--local_rank=0"]
    assert subprocess.run([*torchrun, *config], stdout=subprocess.DEVNULL, timeout=120).returncode == 0
    assert read_metrics(run)[-1]["step"] == 2
