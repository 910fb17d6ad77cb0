"""`megalm launch --hostfile` inside of a Slurm allocation, where hosts are reached through srun."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from hosts import Hosts
from runs import losses, write_config
from slurm import Slurm, needed

from megalm.cli import main

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(needed()), reason=needed()),
]


def test_hosts_of_an_allocation_train_what_one_process_trains(data: Path, tmp_path: Path) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone"
    (tmp_path / "hosts").write_text("node2 slots=2\nnode1 slots=2\n")  # Slurm's order counts
    layout = ["parallel.tensor=2", "parallel.pipeline={size: 2, schedule: zbv}", "run.timeout=300.0"]
    steps = ["model.num_layers=4", "schedule={steps: 4}", "optimizer.learning_rate=3.0e-3 # $(touch touched)"]
    words = ["-m", "megalm", "launch", write_config(data, run), "--hostfile", "hosts", *layout, *steps]
    environment = {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with Hosts(tmp_path / "two") as hosts, Slurm(hosts) as slurm:
        command = shlex.join([sys.executable, *words])
        options = ["--nodes=2", "--ntasks-per-node=1", "--output=%j.log", "--time=10"]
        job = slurm.submit(*options, f"--wrap={command}", cwd=tmp_path, **environment, PATH=os.environ["PATH"])
        state = slurm.wait_for(job, "COMPLETED", "FAILED")
        said = (tmp_path / f"{job}.log").read_text()
        assert state == "COMPLETED", said
        assert "step 4: loss" in said
        assert "launch.py" not in said
        wrong = shlex.join([sys.executable, *words, "parallel.data=2"])
        job = slurm.submit(*options, f"--wrap={wrong}", cwd=tmp_path, **environment, PATH=os.environ["PATH"])
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
    assert not (tmp_path / "touched").exists()
    assert main(["train", write_config(data, alone), *steps]) == 0
    for (_, *line), (_, *wanted) in zip(losses(run), losses(alone), strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)
