"""Whole runs through the command line, in processes that can be killed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from runs import losses, read_metrics, start, wait_for_step, write_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalm.cli import main
from megalm.train.evaluate import portion
from megalm.train.trained import find_model


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    run = data / "whole"
    assert start(write_config(data, run)).wait(200) == 0
    return run


def test_the_loss_falls_and_the_run_directory_is_complete(whole: Path) -> None:
    steps = losses(whole)
    assert steps[-1][1] < 0.6 * steps[0][1]
    lines = read_metrics(whole)
    assert [line["step"] for line in lines if line.get("kind") == "evaluation"] == [0, 30, 60]
    wanted = {"step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "step_seconds"}
    wanted |= {"data_wait_seconds", "memory_bytes", "tokens_by_source", "data_hash"}
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_saves_leaves_word_and_exits_with_0(
    data: Path, whole: Path, number: signal.Signals
) -> None:
    run = data / f"told-by-{number.name}"
    config = write_config(data, run)
    process = start(config)
    wait_for_step(process, run, 12)
    process.send_signal(number)
    assert process.wait(60) == 0
    last = losses(run)[-1][0]
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert (run / "stopped").read_text() == f"{number.name} after step {last} of 60\n"
    assert start(config).wait(200) == 0
    assert losses(run) == losses(whole)
    assert not (run / "stopped").exists()


def test_a_run_stops_in_time_for_its_limit_and_goes_on_bit_for_bit(data: Path, whole: Path) -> None:
    run = data / "limited"
    config = write_config(data, run)
    assert start(config, "run.time_limit=0.1").wait(200) == 0
    assert (run / "stopped").read_text() == "run.time_limit after step 1 of 60\n"
    assert start(config, "run.time_limit=9:00:00").wait(200) == 0
    assert losses(run) == losses(whole)
    assert not (run / "stopped").exists()


def test_a_killed_run_in_bfloat16_with_growing_batches_goes_on_bit_for_bit(data: Path) -> None:
    overrides = [
        "precision.compute=bfloat16",
        "batch.ramp={start: 4, increment: 4, samples: 120}",
        "batch.micro_size=2",
    ]
    overrides += ["schedule.steps=30", "checkpoint.every=4", "run.recompute=selective"]
    runs = data / "growing", data / "growing-killed"
    configs = [write_config(data, run) for run in runs]
    assert start(configs[0], *overrides).wait(200) == 0
    for step in (6, 19):
        process = start(configs[1], *overrides)
        wait_for_step(process, runs[1], step)
        process.kill()
        process.wait()
    assert start(configs[1], *overrides).wait(200) == 0
    assert losses(runs[1]) == losses(runs[0])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(whole, run)
    for file in (run / "checkpoints" / "step-00000060").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    assert main(["train", write_config(data, run)]) == 0
    assert "trying the one before" in (run / "train.log").read_text()
    assert losses(run) == losses(whole)


def test_other_batches_are_refused_when_continuing(data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "config.yaml").read_text()
    assert main(["train", write_config(data, whole), "batch.global_size=16", "schedule.steps=70"]) == 2
    assert (whole / "config.yaml").read_text() == before
    error = capsys.readouterr().err
    assert "batch.global_size: 8 -> 16" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rope_theta=777.0", "model.rope_theta: 10000.0 -> 777.0"),
        ("model.sliding_window=7", "model.sliding_window: None -> 7"),
        ("model.num_heads=8", "model.num_heads: 4 -> 8"),
        ("schedule.steps=20", "schedule.steps=20 is less than the 60 steps"),
    ],
)
def test_another_model_or_a_shorter_run_is_refused_when_continuing(
    data: Path, whole: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "config.yaml").read_text()
    assert main(["train", write_config(data, whole), override]) == 2
    assert (whole / "config.yaml").read_text() == before
    assert words in capsys.readouterr().err


def test_a_run_whose_reader_goes_away_goes_on(data: Path, whole: Path) -> None:
    run = data / "unread"
    process = start(write_config(data, run), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(200) == 0
    assert losses(run) == losses(whole)


def test_a_run_that_diverges_ends_in_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = data / "diverging"
    overrides = ["optimizer={learning_rate: 1.0e+30, clip_norm: null}", "schedule.warmup_steps=0"]
    assert main(["train", write_config(data, run), *overrides]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "training has diverged" in error[-1]
    assert "lower optimizer.learning_rate=1e+30" in error[-1]


def test_tensorboard_has_the_numbers_of_the_metrics(data: Path) -> None:
    run = data / "events"
    assert main(["train", write_config(data, run), "log.tensorboard=true", "schedule.steps=16"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = [line for line in read_metrics(run) if "kind" not in line]
    written = {event.step: event.value for event in events.Scalars("train/loss")}
    assert written == pytest.approx({line["step"]: line["loss"] for line in steps})
    assert [event.step for event in events.Scalars("evaluation/loss")] == [0, 16]


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
    last = read_metrics(whole)[-1]
    assert f"{last['sources']['a']['loss']:.4f}" in printed
    assert f"{last['loss']:.4f}" in printed


def test_bits_per_byte_count_the_text_and_not_its_end(data: Path, whole: Path) -> None:
    line = read_metrics(whole)[-1]
    source = line["sources"]["a"]
    # A byte tokenizer's tokens are bytes, but for the end-of-document token, which stands for none.
    assert 0 < source["evaluated_tokens"] - source["evaluated_bytes"] < 4 * 3
    nats = source["loss"] * source["evaluated_tokens"]
    assert source["bits_per_byte"] == pytest.approx(nats / math.log(2) / source["evaluated_bytes"])
    assert source["perplexity"] == pytest.approx(math.exp(source["loss"]))


def test_a_run_can_be_moved_and_evaluated_from_anywhere(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "moved")
    shutil.copytree(data / "a", tmp_path / "renamed")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "moved/checkpoints/step-00000060", "--data", "renamed"]) == 0
    printed = capsys.readouterr().out
    assert "held out" in printed
    assert f"{read_metrics(whole)[-1]['sources']['a']['loss']:.4f}" in printed
    ours, other = (
        portion(find_model(Path("moved"), overrides=keys), Path("renamed"))
        for keys in ([], ["data.sequence_length=48", "data.validation.samples=1000"])
    )
    assert ours.first * 64 <= other.first * 48 < ours.first * 64 + 48, "in what was held out, whatever the settings"
    end, others_end = (ours.first + ours.count) * 64, (other.first + other.count) * 48
    assert end - 48 < others_end <= end


def test_another_tokenizer_than_the_checkpoints_is_refused(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tokenizer"
    text = str(data / "a.jsonl")
    trained = ["tokenizer", "train", "--kind", "bpe", "--vocab-size", "300", "--input", text, "--output", str(other)]
    assert main(trained) == 0
    prepared = ["data", "prepare", "--input", text, "--tokenizer", str(other), "--output", str(tmp_path / "other")]
    assert main(prepared) == 0
    capsys.readouterr()
    assert main(["evaluate", str(whole), "--data", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error
    assert error.count("\n") == 1
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(other, tmp_path / "run" / "tokenizer")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "is not the tokenizer that" in capsys.readouterr().err


def test_a_model_with_more_rows_than_tokens_writes_tokens_only(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = data / "rows"
    overrides = ["model.vocab_size=2000", "schedule={steps: 1}"]
    assert main(["train", write_config(data, run), *overrides]) == 0
    for options in (["--temperature", "50"], ["--top-p", "0"], ["--temperature", "1e-300"]):
        assert main(["generate", str(run), "--prompt", "a: ", "--max-new-tokens", "200", *options]) == 0
    assert capsys.readouterr().err == ""


def test_several_prompts_give_lines_of_json_whatever_is_in_them(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a\xad\x85", "\U000e0001", 'é "b"\n\x1b[2J']
    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main(["generate", str(whole), *options, "--max-new-tokens", "3", "--temperature", "50"]) == 0
    printed = capsys.readouterr().out
    assert [json.loads(line)["prompt"] for line in printed.splitlines()] == prompts
    assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize(("prompt", "words"), [("", "--prompt is empty"), ("\udcff", "--prompt is not valid UTF-8")])
def test_a_prompt_that_cannot_be_encoded_is_refused(
    whole: Path, prompt: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(whole), "--prompt", prompt]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_checks_and_writes_nothing(data: Path) -> None:
    run = data / "dry"
    assert main(["train", write_config(data, run), "--dry-run"]) == 0
    assert not run.exists()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = data / "small"
    assert main(["train", write_config(data, run), "model.vocab_size=100"]) == 2
    assert "model.vocab_size=100" in capsys.readouterr().err
    assert not run.exists()
