"""What training promises of its data: modes and stages that go on after a kill, needs, proofs, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import losses, read_metrics, start, wait_for_step, write_config

from megalm.cli import main
from megalm.data.loader import assemble
from megalm.train.build import pinned

SOURCES = "data.sources=[{{name: a, path: {data}/a}}, {{name: b, path: {data}/b, max_epochs: 9}}]"
STAGES = (
    "data.stages=[{name: pre, tokens: 9000, weights: {a: 0.7, b: 0.3}}, {name: mid, tokens: 5000, weights: {b: 1}}, "
    "{name: anneal, weights: {a: 0.2, b: 0.8}}]"
)
MODES = {
    "window": ["data.order=window", "data.window_tokens=2000", "data.fim={prefix: 1, middle: 2, suffix: 3}", STAGES],
    "megatron": ["data.order=megatron", "data.split='90,10'", "data.workers=2"],
}


LOCKED = ("tokens_T", "labels_T", "loss_mask_T", "positions_T")


def overrides(data: Path, mode: str) -> list[str]:
    return [SOURCES.format(data=data), "schedule={steps: 36}", *MODES[mode]]


@pytest.fixture(scope="module", params=MODES)
def whole(data: Path, request: pytest.FixtureRequest) -> Path:
    run = data / f"whole-{request.param}"
    assert main(["train", write_config(data, run), *overrides(data, request.param)]) == 0
    return run


def mode_of(run: Path) -> str:
    return run.name.removeprefix("whole-")


def test_a_killed_run_goes_on_bit_for_bit_in_every_mode_and_stage(data: Path, whole: Path) -> None:
    mode = mode_of(whole)
    run = data / f"killed-{mode}"
    config = write_config(data, run)
    for step in (13, 24) if mode == "window" else (17,):
        process = start(config, *overrides(data, mode))
        wait_for_step(process, run, step)
        process.kill()
        process.wait()
    assert main(["train", config, *overrides(data, mode)]) == 0
    assert losses(run) == losses(whole)
    assert [line.get("data_hash") for line in read_metrics(run)] == [
        line.get("data_hash") for line in read_metrics(whole)
    ]


def test_tracing_gives_the_hash_that_the_run_recorded_whatever_its_batches(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [write_config(data, whole), *overrides(data, mode_of(whole))]
    lines = {line["step"]: line for line in read_metrics(whole) if "kind" not in line}
    saved = json.loads((whole / "checkpoints" / "step-00000035" / "manifest.json").read_text())
    assert lines[35]["data_hash"] in json.dumps(saved)
    for step in (1, 20, 36):
        assert main(["data", "trace", *config, "--step", str(step)]) == 0
        printed = capsys.readouterr().out.split()
        assert printed.count(lines[step]["data_hash"]) == 2
        assert f"{lines[step]['tokens_by_source']['a']:,}" in printed
    assert main(["data", "trace", *config, "batch.micro_size=2", "--step", "20"]) == 0
    assert lines[20]["data_hash"] in capsys.readouterr().out


def test_tracing_another_config_than_the_runs_is_an_error(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [write_config(data, whole), *overrides(data, mode_of(whole))]
    assert main(["data", "trace", *config, "run.seed=5", "--step", "20"]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl: step 20 saw other samples than this config gives" in error
    assert error.count("\n") == 1
    assert main(["data", "trace", *config, "--step", "37"]) == 2
    assert "--step=37 is after the run's last (schedule.steps=36)" in capsys.readouterr().err
    assert main(["data", "trace", *config, "run.dir=nowhere", "--step", "3"]) == 0
    assert "not yet" in capsys.readouterr().out


def test_stages_follow_their_weights(data: Path) -> None:
    run = data / "whole-window"
    if not run.exists():
        assert main(["train", write_config(data, run), *overrides(data, "window")]) == 0
    lines = [line for line in read_metrics(run) if "kind" not in line]
    # 9,000 tokens are 140.6 samples of 64, 14,000 are 218.75: the stages start at samples 141 and 219.
    assert lines[16]["tokens_by_source"]["a"] == pytest.approx(0.7 * 17 * 8 * 64, abs=64)
    assert {line["tokens_by_source"]["a"] for line in lines[18:26]} == {lines[18]["tokens_by_source"]["a"]}
    drawn = lines[-1]["tokens_by_source"]["a"] - lines[18]["tokens_by_source"]["a"]
    assert drawn == pytest.approx(0.2 * (36 * 8 - 219) * 64, abs=64)


def test_the_summary_shows_what_is_wanted_of_each_source(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = data / "summary"
    assert main(["train", write_config(data, run), *overrides(data, "window"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "order window; stage pre (9,000 tokens): a 70%, b 30%; stage mid (5,000 tokens): b 100%" in printed
    assert "source  weight  tokens wanted  tokens there" in printed
    [line] = [line.split() for line in printed.splitlines() if line.split()[:1] == ["b"]]
    assert line[-2:] == ["of", "9"]
    assert not run.exists()


def test_a_source_that_does_not_last_ends_the_run_before_it_starts(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data / "unmet"
    assert main(["train", write_config(data, run), "data.sources.1.max_epochs=0.1"]) == 2
    error = capsys.readouterr().err
    assert "of 'b', 0.23 epochs of the 39,872 that are there, and max_epochs=0.1: prepare" in error
    assert error.count("\n") == 1
    assert not run.exists()


def test_a_mark_that_is_no_token_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(data, data / "marks")
    for mark, words in (("5000", "no id of the model"), ("256", "the end of documents")):
        assert main(["train", config, f"data.fim={{prefix: 1, middle: 2, suffix: {mark}}}"]) == 2
        assert f"data.fim.suffix={mark} is {words}" in capsys.readouterr().err


def test_continuing_with_other_data_names_the_source(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "a", tmp_path / "a")
    text = str(data / "b.jsonl")
    prepare = ["data", "prepare", "--input", text, "--tokenizer", "byte", "--output", str(tmp_path / "b")]
    assert main(prepare) == 0
    config = [write_config(tmp_path, tmp_path / "run"), "schedule={steps: 4}"]
    assert main(["train", *config]) == 0
    (tmp_path / "other.jsonl").write_text(Path(text).read_text() + '{"text": "more"}\n')
    assert main([*prepare[:3], str(tmp_path / "other.jsonl"), *prepare[4:], "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["train", *config]) == 2
    error = capsys.readouterr().err
    assert "was trained on other data or in another order (source 'b' holds other data): continue" in error
    assert (
        main(["train", *config, f"data.sources=[{{name: a, path: {tmp_path}/a}}, {{name: c, path: {tmp_path}/b}}]"])
        == 2
    )
    assert "(source 'b' is left out, source 'c' is new; " in capsys.readouterr().err


def test_locking_pages_changes_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor.data_ptr()) or tensor.clone())
    batch = assemble(torch.arange(20).view(4, 5).numpy(), torch.zeros(4, dtype=torch.int64).numpy(), 7, True)
    for name, array in vars(pinned(batch)).items():
        assert np.array_equal(array, getattr(batch, name)), name
    assert locked == [getattr(batch, name).ctypes.data for name in LOCKED]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_in_page_locked_memory_and_the_same() -> None:
    batch = assemble(torch.arange(20).view(4, 5).numpy(), torch.zeros(4, dtype=torch.int64).numpy(), 7, True)
    locked = pinned(batch)
    for name in LOCKED:
        assert torch.from_numpy(getattr(locked, name)).is_pinned()
        assert (getattr(locked, name) == getattr(batch, name)).all()
