"""What transformers wrote is taken over as it is, or refused with a line that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import MODELS, exported, ignore, small, tokens
from peers import our_logits
from runs import read_metrics, write_config
from safetensors.torch import load_file, save_file

from megalm.checkpoint.huggingface import from_config, to_config
from megalm.checkpoint.weights import Weights
from megalm.cli import main
from megalm.config import load_config
from megalm.errors import UserError
from megalm.model.transformer import Transformer
from megalm.train.exchange import import_

REQUIRED: dict[str, dict[str, Any]] = {
    **{
        kind: {"hidden_size": 64, "num_attention_heads": 32, "num_hidden_layers": 4, "intermediate_size": 96}
        for kind in ("llama", "mistral", "qwen2", "qwen3")
    },
    "gpt2": {"n_embd": 64, "n_head": 8, "n_layer": 2},
}


def taken_over(hf: Path, directory: Path) -> Transformer:
    import_(hf, directory, ignore)
    weights = Weights([directory / "checkpoints" / "step-00000000"])
    model = Transformer(weights.model)
    model.load_state_dict({name: weights.tensor(name) for name in weights.shapes})
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_computes_the_same_here(name: str, tmp_path: Path) -> None:
    config = to_config(small(name).config, 0, "float32")
    torch.manual_seed(3)
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    ).float()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    peer.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    logits_BSV = peer.eval()(tokens()).logits
    assert logits_BSV.std() > 0.3
    assert (our_logits(taken_over(tmp_path / "hf", tmp_path / "ours"), tokens()) - logits_BSV).abs().max() <= 1e-4


def test_bfloat16_becomes_float32_without_a_change(tmp_path: Path) -> None:
    hf = exported(small("llama"), tmp_path, dtype="bfloat16")
    stored = load_file(hf / "model.safetensors")["lm_head.weight"]
    model = taken_over(hf, tmp_path / "ours")
    assert stored.dtype == torch.bfloat16
    assert torch.equal(model.head.weight, stored.float())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize("kind", REQUIRED)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(kind: str) -> None:
    said = {"model_type": kind, "vocab_size": 211, **REQUIRED[kind]}
    spelled_out = transformers.AutoConfig.for_model(**said).to_dict()
    assert from_config(said, "a") == from_config(spelled_out, "b")


def test_early_gpt2_files_are_read(tmp_path: Path) -> None:
    model = small("gpt 2")
    hf = exported(model, tmp_path)
    tensors = load_file(hf / "model.safetensors")
    early = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    early |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(early, hf / "model.safetensors")
    model_again = taken_over(hf, tmp_path / "ours")
    assert torch.equal(our_logits(model_again, tokens()), our_logits(model, tokens()))


CONFIG_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llma"}, "model_type='llma' is none that can be imported: .* Did you mean 'llama'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is in no model of megalm, which has 'silu' only"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type='llama3' has no low_freq_factor"),
    ({"num_hidden_layers": "3"}, "num_layers: Input should be a valid integer"),
    ({"num_hidden_layers": 4}, "has no tensor 'model.layers.3.mlp.gate_proj.weight'"),
    ({"num_hidden_layers": 2}, "has a tensor 'model.layers.2.input_layernorm.weight', for which"),
    ({"intermediate_size": 175}, r"gate_proj.weight' is \[176, 64\], but its config makes it \[175, 64\]"),
    ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "only some layers have the sliding"),
]


@pytest.mark.parametrize(("changes", "says"), CONFIG_CHANGES)
def test_what_does_not_fit_is_named_and_nothing_is_written(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    hf = exported(small("llama"), tmp_path)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=says):
        import_(hf, tmp_path / "ours", ignore)
    assert not (tmp_path / "ours").exists()


def test_pickled_or_damaged_weights_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = exported(small("llama"), tmp_path)
    content = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(content[:-100])
    command = ["import", str(hf), "--output", str(tmp_path / "ours")]
    assert main(command) == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    assert main(command) == 2
    assert "pytorch_model.bin is a pickle" in capsys.readouterr().err
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../model.safetensors"}}')
    assert main(command) == 2
    assert "does not name files of the directory" in capsys.readouterr().err
    (hf / "config.json").write_text("{")
    assert main(command) == 2
    assert "config.json: malformed JSON" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_a_run_goes_on_from_a_model_that_was_exported_and_imported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(data, tmp_path / "run")
    short = ["schedule={steps: 4}", "evaluate.every=4", "checkpoint.every=4"]
    assert main(["train", config, *short]) == 0
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "hf")]) == 0
    assert main(["import", str(tmp_path / "hf"), "--output", str(tmp_path / "ours")]) == 0
    new = ["run.seed=7", f"run.dir={tmp_path}/new", f"run.init_from={tmp_path}/ours"]
    assert main(["train", config, *short, *new]) == 0
    before, after = read_metrics(tmp_path / "run")[-1], read_metrics(tmp_path / "new")[0]
    assert (after["step"], after["kind"]) == (0, "evaluation")
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-6)
    assert read_metrics(tmp_path / "new")[-1]["loss"] < after["loss"]
    assert main(["train", config, *short, *new, "schedule={steps: 5}"]) == 0  # goes on from its own checkpoint
    assert [line["step"] for line in read_metrics(tmp_path / "new") if "kind" not in line] == [1, 2, 3, 4, 5]

    capsys.readouterr()
    other = [*new[:1], f"run.dir={tmp_path}/other"]
    for overrides, says in [
        ([f"run.init_from={tmp_path}/ours", "model.rope_theta=5e5"], "is of another model (model.rope_theta: 10000.0"),
        ([f"run.init_from={tmp_path}/hf"], "is in Hugging Face's form: name what `megalm import` makes of it"),
        ([f"run.init_from={tmp_path}/nowhere"], "nowhere: no such checkpoint"),
    ]:
        assert main(["train", config, *other, *overrides]) == 2
        assert says in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "a: ", "choices": ["number", "b"], "answer": 0}\n')
    said = []
    for name in ("run", "ours"):  # a model that is foreign, too, is judged before training goes on
        assert main(["generate", str(tmp_path / name), "--prompt", "a: n", "--temperature", "0"]) == 0
        assert main(["evaluate", str(tmp_path / name), "--choices", str(questions)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 130


def test_the_config_that_an_import_writes_needs_only_data_and_lengths(data: Path, tmp_path: Path) -> None:
    import_(exported(small("qwen 3"), tmp_path), tmp_path / "ours", ignore)
    source = f"[{{name: a, path: {data}/a}}]"
    added = [f"run.dir={tmp_path}/run", "tokenizer.path=byte", f"data={{sequence_length: 64, sources: {source}}}"]
    config = load_config(tmp_path / "ours" / "config.yaml", [*added, "batch.global_size=8", "schedule.steps=10"])
    assert config.model == small("qwen 3").config
    assert config.run.init_from == str(tmp_path / "ours")
