"""What a run does to the directory it is given, and what it leaves where it fails."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from runs import write_config

from megalm.cli import main
from megalm.train import build


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_directory_of_other_files_is_refused_and_left_alone(
    data: Path, tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text("mine")
    assert "holds other files (config.yaml) and no run" in refusal(capsys, write_config(data, run), *option)
    assert os.listdir(run) == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_file_in_the_place_of_the_directory_is_refused_before_work_starts(
    data: Path, tmp_path: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = write_config(data, tmp_path / "run")
    error = refusal(capsys, config, f"run.dir={tmp_path}/file{inside}", "--dry-run")
    assert f"{tmp_path}/file is a file" in error


def test_a_model_that_does_not_fit_in_memory_is_refused_before_work_starts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(data, tmp_path / "run")
    assert "GiB of memory: choose a smaller" in refusal(capsys, config, "model.hidden_size=4_000_000", "--dry-run")


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_before_its_first_number_leaves_nothing(
    data: Path,
    tmp_path: Path,
    existed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    if existed:
        run.mkdir()
    monkeypatch.setattr(build, "total_memory", lambda device: 2**80)
    assert "out of memory" in refusal(capsys, write_config(data, run), "model.hidden_size=4_000_000")
    assert run.exists() == existed
    assert not existed or not any(run.iterdir())


def test_damaged_held_out_tokens_end_in_one_line_and_leave_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "a", tmp_path / "a")
    (tokens,) = (tmp_path / "a").glob("*.bin")
    tokens.write_bytes(tokens.read_bytes()[:-64] + b"\xff" * 64)
    run = tmp_path / "run"
    source = f"data.sources=[{{name: a, path: {tmp_path}/a}}]"
    assert tokens.name in refusal(capsys, write_config(data, run), source)
    assert not run.exists()


def test_only_the_tokenizers_files_are_copied(data: Path, tmp_path: Path) -> None:
    tokenizer, prepared, run = tmp_path / "tokenizer", tmp_path / "a", tmp_path / "tokenizer" / "run"
    text = str(data / "a.jsonl")
    made = ["tokenizer", "train", "--kind", "bpe", "--vocab-size", "300", "--input", text, "--output", str(tokenizer)]
    assert main(made) == 0
    assert main(["data", "prepare", "--input", text, "--tokenizer", str(tokenizer), "--output", str(prepared)]) == 0
    config = write_config(data, tmp_path / "run")
    overrides = [f"run.dir={run}", f"tokenizer.path={tokenizer}", f"data.sources=[{{name: a, path: {prepared}}}]"]
    assert main(["train", config, *overrides, "schedule={steps: 1}"]) == 0
    assert sorted(os.listdir(run / "tokenizer")) == ["megalm-tokenizer.json", "tokenizer.json"]
    assert os.listdir(run).count(".megalm-run") == 1


def test_a_checkpoint_is_found_by_its_bare_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", write_config(data, run), "schedule={steps: 1}"]) == 0
    capsys.readouterr()
    for folder, name in ((run / "checkpoints", "step-00000001"), (run / "checkpoints" / "step-00000001", ".")):
        monkeypatch.chdir(folder)
        assert main(["generate", name, "--prompt", "x", "--max-new-tokens", "2"]) == 0
    monkeypatch.chdir(data)
    assert main(["generate", "a", "--prompt", "x"]) == 2
    assert "is no checkpoint's manifest" in capsys.readouterr().err


def test_a_command_that_finds_another_in_the_directory_removes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".megalm-run").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains there" in refusal(capsys, write_config(data, run))
    assert os.listdir(run) == [".megalm-run"]
