"""A checkpoint is judged alike in every layout: losses, likelihoods and texts of several ranks against those of one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layout_runs import settings
from ranks import run_ranks

from megalm.cli import main
from megalm.launch.ranks import Process
from megalm.train import packed
from megalm.train.choices import encode_pairs, likelihoods
from megalm.train.evaluate import portion, score_portion
from megalm.train.generate import Sampling, continuations
from megalm.train.trained import find_model, load_model

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied, qk norm, window": {"tie_embeddings": True, "qk_norm": True, "sliding_window": 9},
    "gpt": {"norm": "layernorm", "activation": "gelu", "position": "learned", "qkv_bias": True, "ffn_bias": True},
    "sinks, capped": {"attention": "fused_softmax", "attention_sinks": True, "logit_softcap": 5.0},
}
LAYOUTS = {
    "tensor 2": (2, ["parallel.tensor=2"]),
    "pipeline 2": (2, ["parallel.pipeline.size=2"]),
    "data 2, zero 3": (2, ["parallel.zero.stage=3"]),
    "tensor 2, pipeline 2": (4, ["parallel.tensor=2", "parallel.pipeline.size=2"]),
    "tensor 4, copied keys": (4, ["parallel.tensor=4"]),
    "pipeline 4": (4, ["parallel.pipeline.size=4"]),
    "data 4": (4, ["parallel.zero.stage=1"]),
    "pipeline 2, data 2, zero 3": (4, ["parallel.pipeline.size=2", "parallel.zero.stage=3"]),
    "tensor 2, data 2, zero 3": (4, ["parallel.tensor=2", "parallel.zero.stage=3"]),
}
DEFAULT = [
    ("llama", "tensor 2"), ("llama", "pipeline 2, data 2, zero 3"), ("tied, qk norm, window", "pipeline 2"),
    ("tied, qk norm, window", "data 2, zero 3"), ("gpt", "tensor 2, pipeline 2"),
    ("sinks, capped", "tensor 4, copied keys"),
]  # fmt: skip
TEXTS = [("a: number", " 1"), ("b", ": number 2 is followed"), ("", "a"), ("number 12 is followed by 13. a: ", "n")]
PROMPTS = ["a: number 1", "b", "a: number 12 is"]


def judged(run: Path, data: Path, overrides: list[str]) -> tuple[Any, ...]:
    """On one rank: scores of two sources, the log-likelihoods of `TEXTS`, and what follows `PROMPTS`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    packed.TOKENS = 40  # several micro-batches; this process does nothing else
    saved = find_model(run, Process(rank, rank, size), overrides)
    trained = load_model(saved)
    scores = [score_portion(trained.passes, saved, portion(saved, data / name)) for name in ("a", "b")]
    pairs = encode_pairs(saved.tokenizer, [("here", *text) for text in TEXTS], saved.positions)
    found = likelihoods(trained.passes, pairs)
    texts = {}
    for name, sampling in (("greedy", Sampling(12, temperature=0)), ("drawn", Sampling(12, seed=3, stop=("e",)))):
        written = [""] * len(PROMPTS)
        for piece in continuations(trained, [saved.tokenizer.encode(prompt) for prompt in PROMPTS], sampling):
            written[piece.document] += piece.text
        texts[name] = written
    return [(score.nats, score.tokens, score.bytes) for score in scores], [log for log, _ in found], texts


@pytest.fixture(scope="module")
def trained_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judged")
    return {name: folder / str(number) for number, name in enumerate(MODELS)}


def run_of(model: str, data: Path, runs: dict[str, Path]) -> Path:
    """A run of three steps, made when it is first asked for."""
    run = runs[model]
    if not run.exists():
        shape = {"num_layers": 4, "num_heads": 4, "init_std": 0.3}
        raw = settings(data, shape | MODELS[model], schedule={"steps": 3}, run={"dir": str(run), "device": "cpu"})
        config = run.with_suffix(".yaml")
        config.write_text(json.dumps(raw))
        assert main(["train", str(config)]) == 0
    return run


def check(model: str, layout: str, data: Path, runs: dict[str, Path]) -> None:
    run, (size, overrides) = run_of(model, data, runs), LAYOUTS[layout]
    [(scores, logs, texts)] = run_ranks(1, judged, run, data, [])
    results = run_ranks(size, judged, run, data, overrides)
    assert all(other == results[0] for other in results), "all ranks know all"
    for ours, theirs in zip(results[0][0], scores, strict=True):
        assert ours[1:] == theirs[1:]
        assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert results[0][1] == pytest.approx(logs, rel=1e-5)
    assert results[0][2] == texts
    assert len(set("".join(texts["greedy"]))) > 5, "constant texts would agree by chance"


@pytest.mark.parametrize(("model", "layout"), DEFAULT)
def test_several_ranks_judge_as_one(model: str, layout: str, data: Path, trained_runs: dict[str, Path]) -> None:
    check(model, layout, data, trained_runs)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_judges_every_model_as_one(
    model: str, layout: str, data: Path, trained_runs: dict[str, Path]
) -> None:
    check(model, layout, data, trained_runs)


@pytest.mark.timeout(700)
def test_the_commands_run_in_several_processes_and_say_all_once(
    data: Path,
    tmp_path: Path,
    trained_runs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(run_of("llama", data, trained_runs))
    questions = tmp_path / "questions.jsonl"
    record = {"context": "a: number", "choices": [" 1", " b", "zzz"], "answer": 0}
    questions.write_text((json.dumps(record) + "\n") * 3)
    judge = ["evaluate", run, "--data", str(data / "a"), str(data / "b"), "--choices", str(questions)]
    write = ["generate", run, "--interactive", "--temperature", "0", "--max-new-tokens", "8"]
    for arguments, typed in ((judge, ""), (write, "a: number\nb\n\na: number\n")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        assert main(arguments) == 0
        alone = capsys.readouterr().out
        program = [sys.executable, "-m", "megalm", *arguments, "--nproc", "2", "--set", "parallel.tensor=2"]
        done = subprocess.run(program, input=typed, capture_output=True, text=True, timeout=280, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == alone.split()
        assert len(alone) > 20
    first, _, _, again, _ = alone.split("\n")
    assert first == again, "an empty line starts anew"


def test_weights_kept_in_bfloat16_give_the_bits_of_those_cast_in_each_pass(
    data: Path, trained_runs: dict[str, Path]
) -> None:
    run = run_of("tied, qk norm, window", data, trained_runs)
    narrow = load_model(find_model(run, overrides=["precision.compute=bfloat16"]))
    wide = load_model(find_model(run))
    [ours], [theirs] = narrow.passes.stages.values(), wide.passes.stages.values()
    theirs.compute = torch.bfloat16
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16, torch.float32}
    tokens = torch.arange(32)
    with torch.no_grad():
        logits = [model.logits(model.hidden(tokens, tokens, torch.tensor([0, 32]))) for model in (ours, theirs)]
    assert torch.equal(*logits)


def test_a_layout_that_does_not_fit_is_a_line_that_says_what_would(
    data: Path, trained_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(run_of("llama", data, trained_runs))
    capsys.readouterr()
    assert main(["generate", run, "--prompt", "a", "--nproc", "2", "--set", "parallel.tensor=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "parallel.tensor=3 needs at least 3 processes, this run has 2: start 3, or choose tensor=2" in error
    assert main(["generate", run, "--prompt", "a", "--set", "parallel.sequence_sharding=true"]) == 2
    assert "texts of any length are not shared by rows" in capsys.readouterr().err
