from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import write_config

from megalm.cli import main
from megalm.train.doctor import differences, slow, slow_group

HEALTHY: dict[str, Any] = {
    "host": "node1", "versions": "torch 2", "device": "H100", "attention": "flash", "memory": 80 << 30,
    "disk": 1 << 40, "sees": True, "clock": 0.001, "flops": 7e14, "groups": [],
}  # fmt: skip

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"versions": "torch 1"}, ["torch 1 instead of torch 2"]),
        ({"device": "A100"}, ["A100 instead of H100"]),
        ({"sees": False, "clock": -3.0}, ["does not see what rank 0 writes to /runs", "its clock is not rank 0's"]),
        ({"flops": 1e14, "memory": 1 << 30}, []),
    ],
)
def test_what_a_run_cannot_go_with_is_told_from_what_only_slows_it_down(odd: dict[str, Any], words: list[str]) -> None:
    findings = [HEALTHY, {**HEALTHY, **odd}, HEALTHY]
    assert [differences(found, findings, Path("/runs")) for found in findings] == [[], words, []]


def test_slow_ranks_and_groups_are_told_from_the_middle_one() -> None:
    findings = [HEALTHY, {**HEALTHY, "flops": 4e14}, {**HEALTHY, "flops": 6e14}, {**HEALTHY, "memory": 1 << 30}]
    assert [slow(found, findings) for found in findings] == [[], ["slow"], [], ["little memory is free"]]
    groups = [
        {"axis": "tensor", "latency": 1e-5, "bandwidth": 4e11},
        {"axis": "tensor", "latency": 1e-5, "bandwidth": 2e11},
        {"axis": "tensor", "latency": 9e-5, "bandwidth": 4e11},
        {"axis": "pipeline", "latency": 1e-3, "bandwidth": 2e10},
    ]
    assert [slow_group(group, groups) for group in groups] == ["", "slow", "slow", ""]


@pytest.mark.parametrize("launcher", [["--nproc=4"], pytest.param(["--hostfile=hosts"], marks=pytest.mark.full)])
def test_every_rank_and_each_group_of_a_layout_is_in_the_tables(tmp_path: Path, launcher: list[str]) -> None:
    (tmp_path / "hosts").write_text("localhost slots=4\n")
    config = write_config(tmp_path, tmp_path / "run")
    layout = ["parallel.tensor=2", "parallel.pipeline.size=2"]
    command = [sys.executable, "-m", "megalm", "doctor", config, *layout, *launcher]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    heading, *lines = done.stdout.splitlines()
    assert f"torch {torch.__version__}" in heading
    rows = [re.split(r"  +", line.strip()) for line in lines]
    assert [row[:2] for row in rows[1:5]] == [[str(rank), socket.gethostname()] for rank in range(4)]
    assert all(abs(float(row[5].removesuffix(" s"))) < 60 for row in rows[1:5])
    groups = [("tensor", "0, 1"), ("tensor", "2, 3"), ("pipeline", "0, 2"), ("pipeline", "1, 3")]
    assert [tuple(row[:2]) for row in rows[6:]] == [*groups, ("all ranks", "0, 1, 2, 3")]
    for row in rows[6:]:
        assert float(row[2].removesuffix(" µs").replace(",", "")) > 0
        assert float(row[3].removesuffix(" GB/s")) >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "run.yaml"]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--nodes=2"], {}, "--nodes=2: is for --slurm"),
        (["--hostfile=h", "--nproc=2"], {}, "--hostfile and --nproc start ranks in different ways"),
        (["--slurm"], {"PATH": "/nowhere"}, "there is no srun here"),
        (["--nproc=2"], TORCHRUN, "--nproc: another launcher has started 2 processes"),
        (["parallel.tensor=2"], {}, "parallel.tensor=2: No such file"),
        (["--hostfile=nowhere"], {}, "nowhere"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    words: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
