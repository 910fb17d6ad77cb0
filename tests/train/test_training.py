"""Whole runs through the command line, in processes that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.cli import main

CONFIG = """
run: {{dir: {run}, device: cpu}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_size: 64}}
tokenizer: {{path: byte}}
data:
  sequence_length: 64
  sources: [{{name: a, path: {data}/a, weight: 0.7}}, {{name: b, path: {data}/b, weight: 0.3}}]
  validation: {{samples: 4}}
batch: {{global_size: 8, micro_size: 4}}
schedule: {{kind: wsd, steps: 60, warmup_steps: 5, decay_steps: 10}}
optimizer: {{learning_rate: 3.0e-3}}
checkpoint: {{every: 5, keep: 2}}
evaluate: {{every: 30}}
log: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        text = folder / f"{name}.jsonl"
        documents = [f"{name}: number {i} is followed by {i + 1}. " * (i % 7 + 1) for i in range(300)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        assert (
            main(["data", "prepare", "--input", str(text), "--tokenizer", "byte", "--output", str(folder / name)]) == 0
        )
    return folder


def write_config(data: Path, run: Path) -> str:
    path = run.with_suffix(".yaml")
    path.write_text(CONFIG.format(run=run, data=data))
    return str(path)


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line.get("grad_norm", 0.0)) for line in lines]


def start(config: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import sys; from megalm.cli import main; sys.exit(main())", "train", config]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and f'"step":{step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached")


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    run = data / "whole"
    assert start(write_config(data, run)).wait(200) == 0
    return run


def test_the_loss_falls_and_the_run_directory_is_complete(whole: Path) -> None:
    steps = losses(whole)
    assert steps[-1][1] < 0.6 * steps[0][1]
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("kind") == "evaluation"] == [0, 30, 60]
    wanted = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "step_seconds"}
    wanted |= {"data_wait_seconds", "memory_bytes", "tokens_by_source"}
    assert all(set(line) == wanted for line in lines if "kind" not in line)
    assert sum(lines[-2]["tokens_by_source"].values()) == lines[-2]["tokens"] == 60 * 8 * 64
    assert sorted(path.name for path in (whole / "checkpoints").glob("step-*")) == ["step-00000055", "step-00000060"]


def test_killed_runs_go_on_bit_for_bit(data: Path, whole: Path) -> None:
    run = data / "killed"
    config = write_config(data, run)
    for step in (3, 17, 41):
        process = start(config)
        wait_for_step(process, run, step)
        process.kill()
        process.wait()
    assert start(config).wait(200) == 0
    assert losses(run) == losses(whole)


def test_sigterm_saves_and_exits_with_0(data: Path, whole: Path) -> None:
    run = data / "stopped"
    config = write_config(data, run)
    process = start(config)
    wait_for_step(process, run, 12)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    last = losses(run)[-1][0]
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert start(config).wait(200) == 0
    assert losses(run) == losses(whole)


def test_other_data_is_refused_when_continuing(data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "config.yaml").read_text()
    assert main(["train", write_config(data, whole), "run.seed=5"]) == 2
    assert (whole / "config.yaml").read_text() == before
    error = capsys.readouterr().err
    assert "run.seed: 1234 -> 5" in error
    assert error.count("\n") == 1


def test_generation_repeats_with_its_seed_and_evaluation_gives_each_source(
    data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(whole), "--prompt", "a: number", "--max-new-tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("a: number")
    assert main(["evaluate", str(whole), "--data", str(data / "a"), str(data / "b")]) == 0
    printed = capsys.readouterr().out
    last = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"{last['sources']['a']['loss']:.4f}" in printed
    assert f"{last['loss']:.4f}" in printed


def test_a_dry_run_checks_and_writes_nothing(data: Path) -> None:
    run = data / "dry"
    assert main(["train", write_config(data, run), "--dry-run"]) == 0
    assert not run.exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = data / "small"
    assert main(["train", write_config(data, run), "model.vocab_size=100"]) == 2
    assert "model.vocab_size=100" in capsys.readouterr().err
    assert not run.exists()
