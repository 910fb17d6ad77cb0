"""EleutherAI's harness on our models: its requests against its own `hf` model, and a task of its own by the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peers import llama
from ranks import run_ranks
from runs import write_config

from megalm.cli import main
from megalm.launch.ranks import Process
from megalm.train.choices import answered, encode_questions, likelihoods, read_questions
from megalm.train.lm_eval import MegalmLM, run_tasks
from megalm.train.trained import TrainedModel, find_model, load_model

TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """Of a few steps, with a trained tokenizer."""
    folder = tmp_path_factory.mktemp("lm-eval")
    text, tokenizer, prepared = str(data / "a.jsonl"), str(folder / "tokenizer"), str(folder / "a")
    made = ["tokenizer", "train", "--kind", "bpe", "--vocab-size", "300", "--input", text, "--output", tokenizer]
    assert main(made) == 0
    assert main(["data", "prepare", "--input", text, "--tokenizer", tokenizer, "--output", prepared]) == 0
    changes = [f"tokenizer.path={tokenizer}", f"data.sources=[{{name: a, path: {prepared}}}]", "schedule={steps: 8}"]
    assert main(["train", write_config(data, folder / "run"), *changes, "model.init_std=0.3"]) == 0
    return load_model(find_model(folder / "run"))


@pytest.fixture(scope="module")
def peer(trained: TrainedModel) -> HFLM:
    """transformers with the same weights, under the harness's own class."""
    config, [stage] = trained.config.model, trained.passes.stages.values()
    model = llama(config, stage.state_dict()).eval()
    model.generation_config.pad_token_id = trained.tokenizer.eod
    file = trained.saved.checkpoint.parent.parent / "tokenizer" / "tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=trained.saved.positions, batch_size=2, device="cpu")


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


LONG = "a: number 1 is followed by 2. " * 12


def test_its_requests_are_answered_as_by_its_own_model(trained: TrainedModel, peer: HFLM) -> None:
    ours = MegalmLM(trained)
    pairs = [("a: number 1 is ", "followed"), ("", "a: number"), (LONG, " a: n"), ("b", " é"), ("a", ": num")]
    asked = requests("loglikelihood", *pairs)
    for (log, greedy), (their_log, theirs) in zip(ours.loglikelihood(asked), peer.loglikelihood(asked), strict=True):
        assert log == pytest.approx(their_log, rel=1e-4)
        assert greedy == theirs
    asked = requests("loglikelihood_rolling", ("a: number 7",), (LONG,))
    assert ours.loglikelihood_rolling(asked) == pytest.approx(peer.loglikelihood_rolling(asked), rel=1e-4)
    greedy, until = {"until": ["\n\n"], "max_gen_toks": 12}, {"until": [" 1", "by"], "max_gen_toks": 20}
    asked = requests("generate_until", ("a: number 1 is", greedy), ("a: n", until), (LONG, greedy))
    texts = ours.generate_until(asked)
    assert texts == peer.generate_until(asked)
    assert len(set("".join(texts))) > 3, "constant texts would agree by chance"


def test_a_text_ends_where_learned_positions_do(data: Path, tmp_path: Path) -> None:
    changes = ["schedule={steps: 1}", "model.position=learned", "model.max_positions=64", "model.init_std=0.3"]
    assert main(["train", write_config(data, tmp_path / "run"), *changes]) == 0
    ours = MegalmLM(load_model(find_model(tmp_path / "run")))
    [text] = ours.generate_until(requests("generate_until", (LONG, {"until": []})))
    assert 0 < len(text.encode()) <= 3 * 63


def results(run: Path, folder: Path) -> list[tuple[str, str, float, float | None]]:
    """What one of two processes gets."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank)  # as launchers say
    trained = load_model(find_model(run, Process(rank, rank, 2), ["parallel.tensor=2"]))
    return list(run_tasks(trained, ["numbers"], folder, None))


@pytest.mark.timeout(600)  # each rank imports the harness
def test_a_task_of_its_format_scores_as_the_built_in_choices_do(
    trained: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    questions = tmp_path / "questions.jsonl"
    more = [" followed by 2.", " ééé", " number 1 is followed by 2. a: number", " é" * 9]
    records = [
        {
            "context": f"a: number {n} is" + " " * (n % 2),
            "choices": [" b", more[n % 4], more[n % 3]],
            "answer": n % 2,
        }
        for n in range(12)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "numbers.yaml").write_text(TASK.format(questions=questions))
    asked = read_questions(questions)
    pairs = encode_questions(trained.tokenizer, asked, trained.saved.positions)
    scores = answered(asked, likelihoods(trained.passes, pairs))
    alone = list(run_tasks(trained, ["numbers"], tmp_path, None))
    found = {metric: (value, error) for _, metric, value, error in alone}
    wanted = {name: getattr(scores, name) for name in ("acc", "acc_norm", "acc_bytes")}
    assert {metric: value for metric, (value, _) in found.items()} == pytest.approx(wanted)
    assert [error for _, error in found.values()] == pytest.approx([scores.error(value) for value in wanted.values()])
    assert len(set(wanted.values())) > 1, "lengths matter here"
    assert run_ranks(2, results, trained.saved.checkpoint, tmp_path, timeout=400) == [alone, []]

    run = str(trained.saved.checkpoint)
    capsys.readouterr()
    chosen = ["--choices", str(questions), "--task", "numbers", "--task-folder", str(tmp_path)]
    assert main(["evaluate", run, *chosen]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{scores.acc_norm:.4f} ± {scores.error(scores.acc_norm):.4f}") >= 2
    assert main(["evaluate", run, "--task", "letters", "--task-folder", str(tmp_path)]) == 2
    assert "--task letters: there is no such benchmark" in capsys.readouterr().err
