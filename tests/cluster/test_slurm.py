"""Runs in a real Slurm of two nodes: the examples, and what `megalm launch --slurm` submits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hosts import Hosts, made
from hosts import needed as hosts_need
from runs import losses, write_config
from slurm import Slurm
from slurm import needed as slurm_needs

from megalm.cli import main

MISSING = hosts_need() or slurm_needs()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
    pytest.mark.timeout(1500),
]
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "slurm"
TWO_BY_TWO = ["model.num_layers=4", "parallel.tensor=2", "parallel.pipeline.size=2", "run.timeout=900.0"]
TWO_NODES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=10"]
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "eth0",
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    hosts = Hosts(tmp_path_factory.mktemp("cluster"))
    with made(hosts, Slurm(hosts)) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _no_job_is_left(slurm: Slurm) -> Iterator[None]:
    yield
    for job in slurm.client("squeue", "--noheader", "--format=%i").split():
        slurm.client("scancel", job)
    for job in slurm.client("squeue", "--noheader", "--format=%A").split():
        slurm.wait_for(job, "CANCELLED", "COMPLETED", "FAILED", "TIMEOUT")


@pytest.fixture(scope="module")
def alone(data: Path) -> Path:
    """What one process makes of the config of these tests."""
    run = data / "one-process"
    assert main(["train", write_config(data, run), "model.num_layers=4", "schedule.steps=30"]) == 0
    return run


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """An uninterrupted run of the layout of these tests."""
    run = data / "uninterrupted"
    words = ["train", write_config(data, run), *TWO_BY_TWO, "--nproc", "4"]
    here = os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-m", "megalm", *words], check=True, timeout=600, env=here)
    return run


def launch(slurm: Slurm, config: str, *words: str) -> str:
    """The job that `megalm launch --slurm` submits."""
    command = [sys.executable, "-m", "megalm", "launch", config, *TWO_BY_TWO, "--slurm", "--nodes=2"]
    answer = slurm.run(*command, "--processes-per-node=2", *words, cwd=Path(config).parent, **ENVIRONMENT)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()[1]


def wait_for_step(slurm: Slurm, job: str, run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and f'"step":{step},' in (run / "metrics.jsonl").read_text():
            return
        if slurm.field(job, "JobState") in ("FAILED", "COMPLETED", "TIMEOUT", "CANCELLED"):
            break
        time.sleep(0.1)
    pytest.fail(f"step {step} was not reached: {said(run.parent, job)}")


def said(folder: Path, job: str) -> str:
    return "\n".join(path.read_text() for path in folder.glob(f"*{job}.log"))


@pytest.mark.parametrize("script", ["train-8-nodes.sh", "train-deepspeed.sh"])
def test_an_example_trains_on_two_nodes_as_one_process_does(
    slurm: Slurm, data: Path, alone: Path, tmp_path: Path, script: str
) -> None:
    run = tmp_path / "run"
    options = [*TWO_NODES, *(["--ntasks-per-node=1"] if "deepspeed" in script else [])]
    words = [write_config(data, run), str(run), *TWO_BY_TWO, "schedule.steps=30"]
    job = slurm.submit(*options, str(EXAMPLES / script), *words, cwd=tmp_path, RANKS_PER_NODE="2", **ENVIRONMENT)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", said(tmp_path, job)
    for (step, *ours), (_, *theirs) in zip(losses(run), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step}"
    assert not list(tmp_path.glob("hosts-*"))


def held_until_told(slurm: Slurm, act: Callable[[], object] = lambda: None) -> None:
    """Suspends the ranks before `act`, until each has been sent a signal: they are in the same step as before, however
    fast steps are here."""
    found = [process for name in slurm.hosts.names for process in slurm.hosts.processes(name, "megalm.train")]
    ranks = [rank for rank in found if rank.name().startswith("python")]
    assert len(ranks) == 4
    for rank in ranks:
        rank.suspend()
    deadline = time.monotonic() + 300
    while not all(rank.status() == psutil.STATUS_STOPPED for rank in ranks):
        assert time.monotonic() < deadline, "a rank cannot be suspended"
        time.sleep(0.1)
    act()
    while not all(_told(rank) for rank in ranks):
        assert time.monotonic() < deadline, "no signal has come"
        time.sleep(0.1)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()


def _told(rank: psutil.Process) -> bool:
    """Whether a signal waits for a suspended rank, or Slurm has woken it, too, as it does in some cases."""
    try:
        lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
        pending = next(line for line in lines if line.startswith("ShdPnd"))
        return int(pending.split()[1], 16) != 0 or rank.status() != psutil.STATUS_STOPPED
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return True


def goes_on(slurm: Slurm, job: str, run: Path, whole: Path, because: str) -> None:
    """The job comes back and makes what an uninterrupted run makes, bit for bit."""
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", said(run.parent, job)
    assert slurm.field(job, "Restarts") == "1"
    log = (run / "train.log").read_text()
    assert because in log
    assert "continuing from" in log
    assert losses(run) == losses(whole)


def test_a_job_saves_on_its_signal_goes_back_to_the_queue_and_goes_on_bit_for_bit(
    slurm: Slurm, data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launch(slurm, write_config(data, run), "--time=10")
    wait_for_step(slurm, job, run, 3)
    held_until_told(slurm, lambda: slurm.client("scancel", "--signal=USR1", job))
    goes_on(slurm, job, run, whole, "SIGUSR1: stopped after step")


def test_a_cancelled_job_saves_and_does_not_go_back_to_the_queue(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = launch(slurm, write_config(data, run), "schedule.steps=100000", "checkpoint.every=100000", "--time=10")
    wait_for_step(slurm, job, run, 3)
    slurm.client("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    deadline = time.monotonic() + 30
    while not (run / "stopped").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (run / "stopped").read_text().startswith("SIGTERM after step")
    assert slurm.field(job, "JobState") == "CANCELLED"
    assert slurm.field(job, "Restarts") == "0"


@pytest.mark.full
def test_the_time_limits_signal_saves_and_the_job_goes_on_bit_for_bit(
    slurm: Slurm, data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launch(slurm, write_config(data, run), "--time=4", "--signal-before=60")
    wait_for_step(slurm, job, run, 3)
    held_until_told(slurm)
    goes_on(slurm, job, run, whole, "SIGUSR1: stopped after step")


@pytest.mark.full
def test_a_job_that_gives_way_to_a_more_important_one_goes_on_bit_for_bit(
    slurm: Slurm, data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = launch(slurm, write_config(data, run), "--time=10")
    wait_for_step(slurm, job, run, 3)
    held_until_told(slurm, lambda: slurm.submit("--partition=high", "--nodes=2", "-n16", "--wrap=true"))
    goes_on(slurm, job, run, whole, "SIGTERM: stopped after step")


@pytest.mark.full
def test_a_job_whose_node_dies_goes_on_with_another_one(slurm: Slurm, data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = launch(slurm, write_config(data, run), "--time=10")
    wait_for_step(slurm, job, run, 8)  # the first checkpoint is of step 5
    slurm.kill_node("node2")
    slurm.wait_for(job, "PENDING")  # not with node2 again: Slurm would still end what had this job's number there
    slurm.start_node("spare")
    goes_on(slurm, job, run, whole, "continuing from")


def test_slurm_takes_each_example(slurm: Slurm) -> None:
    scripts = {path.name: [str(path)] for path in EXAMPLES.glob("*.sh")}
    scripts |= {f"{nodes} nodes": [f"--nodes={nodes}", str(EXAMPLES / "train-deepspeed.sh")] for nodes in (1, 512)}
    assert len(scripts) == 7
    for name, words in scripts.items():
        answer = slurm.run("sbatch", "--test-only", "--partition=big", *words)
        assert answer.returncode == 0, f"{name}: {answer.stderr}"
        assert "to start at" in answer.stderr


def test_an_array_of_tasks_prepares_data(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    words = [str(data / "a.jsonl"), "byte", str(tmp_path / "tokens")]
    job = slurm.submit("--array=0-1", str(EXAMPLES / "prepare.sh"), *words, cwd=tmp_path, **ENVIRONMENT)
    for task in ("0", "1"):
        assert slurm.wait_for(f"{job}_{task}", "COMPLETED", "FAILED") == "COMPLETED", said(tmp_path, job)
    assert (tmp_path / "tokens" / "manifest.json").exists()


def test_the_doctor_sees_both_nodes(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    config = write_config(data, tmp_path / "run")
    words = ["doctor", config, *TWO_BY_TWO, "--slurm", "--nodes=2", "--nproc=2"]
    answer = slurm.run(sys.executable, "-m", "megalm", *words, cwd=tmp_path, **ENVIRONMENT)
    assert answer.returncode == 0, answer.stderr
    for word in ("node1", "node2", "tensor", "pipeline", "all ranks"):
        assert word in answer.stdout
