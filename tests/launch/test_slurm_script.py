"""The batch script of `megalm launch --slurm`: what it asks for, and what it does where other commands play Slurm's."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from runs import write_config

from megalm.cli import main
from megalm.launch import slurm


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What --dry-run prints."""
    assert main(["launch", *arguments, "--slurm", "--dry-run"]) == 0
    return capsys.readouterr().out


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def play(tmp_path: Path, text: str, srun: str) -> tuple[int, list[str], bool]:
    """Runs a batch script with an `srun` that does what is said: exit code, srun's arguments, whether it was queued
    again."""
    commands = tmp_path / "bin"
    commands.mkdir(exist_ok=True)
    for name, body in (
        ("srun", f'printf "%s\\0" "$@" > {tmp_path}/arguments\n{srun}'),
        ("scontrol", f'echo "$@" > {tmp_path}/queued'),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "queued").unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    code = subprocess.run(["bash", "-c", text], env=environment, timeout=60).returncode
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    queued = (tmp_path / "queued").exists()
    assert not queued or (tmp_path / "queued").read_text() == "requeue 7\n"
    return code, arguments, queued


def test_a_script_asks_for_what_is_given_and_nothing_else(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(data, tmp_path / "my run")
    always = ["requeue", "open-mode=append", "output=%x-%j.log"]
    few = ["job-name=my-run", "nodes=2", "ntasks-per-node=1", "signal=USR1@120"]
    assert options(script(capsys, config, "--nodes=2")) == [*few, *always]
    more = ["--gpus-per-node=4", "--time=1-00:00:00", "--partition=a,b", "--account=team", "--signal-before=300"]
    assert options(script(capsys, config, "batch.micro_size=2", "--nodes=1", *more)) == [
        "job-name=my-run", "nodes=1", "ntasks-per-node=4", "gpus-per-node=4", "time=1-00:00:00", "partition=a,b",
        "account=team", "signal=USR1@300", *always,
    ]  # fmt: skip


def test_what_is_given_reaches_the_ranks_word_by_word_and_no_shell_reads_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = f"run.dir={tmp_path}/a$(touch {tmp_path}/ran)`touch {tmp_path}/ran`;'"
    config = write_config(data, tmp_path / "it's $(touch ran) ; mine")
    text = script(capsys, config, "schedule.steps=50", odd, "--nodes=1")
    code, arguments, queued = play(tmp_path, text, "exit 0")
    assert (code, queued) == (0, False)
    assert arguments[0] == "--kill-on-bad-exit=1"
    assert arguments[-3:] == [config, "schedule.steps=50", odd]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("happens", "code", "again"),
    [
        ("exit 0", 0, False),
        ("touch {run}/stopped", 0, True),
        ("touch {run}/stopped; exit 1", 1, False),
        ("echo 'now saved the checkpoint of step 2, there' >> {run}/train.log; exit 1", 1, True),
        ("echo 'now saved the checkpoint of step 2, there' >> {run}/train.log; exit 0", 0, False),
        ("echo 'step 2: validation loss 4' >> {run}/train.log; exit 1", 1, False),
        ("exit 2", 2, False),
    ],
)
def test_a_job_goes_back_to_the_queue_if_there_is_more_to_do_and_it_got_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], happens: str, code: int, again: bool
) -> None:
    run = tmp_path / "the run"
    run.mkdir()
    (run / "train.log").write_text("now saved the checkpoint of step 1, there\n")
    text = script(capsys, write_config(data, run), "--nodes=1")
    assert play(tmp_path, text, happens.format(run=shlex.quote(str(run))))[::2] == (code, again)


def test_a_container_sees_what_the_config_names(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    config = write_config(data, tmp_path / "run")
    keys = [f"run.init_from={data}/start", f"checkpoint.path={elsewhere}/new/checkpoints"]
    folders = sorted(map(str, (tmp_path, data / "a", data / "b", data / "start", elsewhere)))
    pyxis = ["--nodes=1", "--container=nvcr.io/nvidia/pytorch"]
    _, arguments, _ = play(tmp_path, script(capsys, config, *keys, *pyxis), "exit 0")
    mounts = ",".join(f"{folder}:{folder}" for folder in folders)
    image = ["--container-image=nvcr.io/nvidia/pytorch", f"--container-mounts={mounts}"]
    assert arguments[1:5] == [*image, f"--container-workdir={tmp_path}", "python"]
    apptainer = ["--nodes=1", "--gpus-per-node=1", "--container=torch.sif"]
    _, arguments, _ = play(tmp_path, script(capsys, config, *keys, *apptainer), "exit 0")
    words = ["apptainer", "exec", "--nv", "--bind", ",".join(folders), "--pwd", str(tmp_path), "torch.sif", "python"]
    assert arguments[1:10] == words
    monkeypatch.chdir(data)
    _, arguments, _ = play(tmp_path, script(capsys, config, *pyxis), "exit 0")
    assert f"{tmp_path}:{tmp_path}" in arguments[2], "the config is there"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=1", "--time=soon"], "--time=soon: write minutes"),
        (["--nodes=1", "--time=0:02:59"], "leaves no time to train"),
        (["--nodes=1", "--time=3"], "leaves no time to train"),
        (["--nodes=1", "--time=18:00:00", "--signal-before=65535"], "leaves no time to train"),
        (["--nodes=1", "--signal-before=70000"], "--signal-before=70000 is more than Slurm takes"),
        (["--nodes=1", "--container=a.sif", "run.dir=/nowhere/deep/run"], "would be made in /"),
        (["--nodes=1", "--container=a.sif", "run.init_from=/usr/a,b"], "/usr/a,b cannot be shown to it"),
        (["--nodes=1", "--partition=a b"], "--partition='a b' is no name"),
        (["--nodes=1", "--account=$(id)"], r"--account='$(id)' is no name"),
        (["--nodes=3", "parallel.tensor=2"], "parallel.tensor=2"),
        (["--nodes=0"], "--nodes"),
        ([], "on how many nodes?"),
    ],
)
def test_what_slurm_or_the_config_would_refuse_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["launch", write_config(data, tmp_path / "run"), *arguments, "--slurm"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_where_there_is_no_slurm_or_it_refuses_the_reason_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(data, tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", config, "--slurm", "--nodes=1"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid account' >&2\nexit 1\n".replace("/bin/bash", "/bin/sh")
    )
    sbatch.chmod(0o755)
    assert main(["launch", config, "--slurm", "--nodes=1"]) == 2
    assert "Slurm refuses the job: error: invalid account" in capsys.readouterr().err


def test_the_time_that_a_job_may_take_is_read_as_slurm_reads_it() -> None:
    read = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "2-0": 172800, "2-1:30": 178200, "2-1:30:05": 178205}
    assert {time: slurm._seconds(time) for time in read} == read
    assert slurm._seconds("infinite") is None
