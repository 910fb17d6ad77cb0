"""What is exported is loaded by transformers, computes the same, and comes back bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import MODELS, exported, ignore, saved, small, tokens
from peers import our_logits
from safetensors import safe_open

from megalm.checkpoint import save, whole
from megalm.checkpoint.huggingface import architecture_of
from megalm.checkpoint.weights import Weights, save_model
from megalm.config.load import preset_model
from megalm.config.presets import PRESETS
from megalm.errors import UserError
from megalm.train.exchange import export, import_, shapes


def loaded(directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_and_the_way_back_is_bitwise(name: str, tmp_path: Path) -> None:
    model = small(name)
    hf = exported(model, tmp_path)
    peer, report = loaded(hf)
    assert type(peer).__name__ == MODELS[name][0]
    assert not any(report.values()), report
    theirs = peer(tokens()).logits
    assert (our_logits(model, tokens()) - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.3, "logits this flat would agree by chance"

    import_(hf, tmp_path / "back", ignore)
    weights = Weights([tmp_path / "back" / "checkpoints" / "step-00000000"])
    came_back = weights.model
    assert came_back.model_copy(update={"preset": None}) == model.config
    parameters = dict(model.named_parameters())
    assert set(weights.shapes) == set(parameters)
    for key, parameter in parameters.items():
        assert torch.equal(weights.tensor(key), parameter), key


@pytest.mark.parametrize("name", ["llama", "gpt 2"])
def test_shards_are_cut_at_the_limit_and_listed(name: str, tmp_path: Path) -> None:
    model, limit = small(name), 100_000
    hf = exported(model, tmp_path, shard_bytes=limit)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in hf.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    sizes = {}
    for file in files:
        with safe_open(hf / file, "pt") as content:
            held = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        assert all(index["weight_map"][key] == file for key in held)
        sizes[file] = sum(tensor.nbytes for tensor in held.values())
        assert sizes[file] <= limit or len(held) == 1
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    peer, report = loaded(hf)
    assert not any(report.values())
    assert (our_logits(model, tokens()) - peer(tokens()).logits).abs().max() <= 1e-4


def test_bfloat16_is_the_rounded_float32(tmp_path: Path) -> None:
    model = small("llama")
    peer, _ = loaded(exported(model, tmp_path, dtype="bfloat16"), dtype="auto")
    assert peer.dtype == torch.bfloat16
    assert torch.equal(peer.lm_head.weight, model.head.weight.bfloat16())


def steps(directory: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Saves `count` steps of random weights of a small Llama as a run would, and gives them."""
    config, found = small("llama").config, []
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        tensors = {n: torch.randn(p.shape, generator=generator) for n, p in small("llama").named_parameters()}
        state = {"model": config.model_dump(mode="json"), "source": "a test", "tokenizer": None}
        save(directory / "checkpoints", step, whole({f"model.{n}": t for n, t in tensors.items()}), state, keep=count)
        found.append(tensors)
    return found


def test_the_average_is_the_mean_of_the_newest_up_to_a_step(tmp_path: Path) -> None:
    all_steps = steps(tmp_path / "run", 5)
    export(tmp_path / "run", tmp_path / "hf", 3, 3, "float32", 10**9, ignore, ignore)
    peer, _ = loaded(tmp_path / "hf")
    for ours, theirs in {"head.weight": "lm_head.weight", "final_norm.weight": "model.norm.weight"}.items():
        mean = torch.stack([tensors[ours].double() for tensors in all_steps[1:4]]).mean(0)
        assert torch.equal(peer.state_dict()[theirs], mean.float())
    assert "| steps | 1, 2, 3 |" in (tmp_path / "hf" / "README.md").read_text()


def test_a_step_counts_once_while_what_it_replaced_is_there_and_a_checkpoint_may_have_any_name(tmp_path: Path) -> None:
    steps(tmp_path / "run", 3)
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    shutil.copytree(newest, newest.with_name(f".{newest.name}.old-{'0' * 32}"))
    shutil.copytree(newest, tmp_path / "alone")
    for path, average, said in ((tmp_path / "run", 2, "1, 2"), (tmp_path / "alone", 1, "2")):
        export(path, tmp_path / f"hf {average}", None, average, "float32", 10**9, ignore, ignore)
        assert f"| steps | {said} |" in (tmp_path / f"hf {average}" / "README.md").read_text()


@pytest.mark.parametrize(
    ("step", "average", "says"),
    [
        (7, 1, "--step=7: .* has no complete checkpoint of it: there are 0, 1, 2"),
        (None, 4, "--average=4: .* has 3 complete ones up to step 2, of 0, 1, 2"),
        (1, 3, "--average=3: .* has 2 complete ones up to step 1, of 0, 1, 2"),
    ],
)
def test_steps_that_are_not_there_are_named(step: int | None, average: int, says: str, tmp_path: Path) -> None:
    steps(tmp_path / "run", 3)
    with pytest.raises(UserError, match=says):
        export(tmp_path / "run", tmp_path / "hf", step, average, None, 10**9, ignore, ignore)
    one = tmp_path / "run" / "checkpoints" / "step-00000002"
    with pytest.raises(UserError, match=r"--step=1: .* is one step's already"):
        export(one, tmp_path / "hf", 1, 1, None, 10**9, ignore, ignore)
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_that_its_run_removes_meanwhile_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    steps(tmp_path / "run", 2)
    removed = tmp_path / "run" / "checkpoints" / "step-00000001"
    with pytest.raises(UserError, match=r"step-00000001: was removed while it was read, .* higher checkpoint.keep"):
        export(tmp_path / "run", tmp_path / "hf", None, 1, None, 10**9, lambda *_: shutil.rmtree(removed, True), ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    checkpoint = saved(small("llama"), tmp_path / "run")
    content = bytearray((checkpoint / "rank-00000.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        export(checkpoint, tmp_path / "hf", None, 1, None, 10**9, ignore, ignore)
    assert not (tmp_path / "hf").exists()


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").touch()
    with pytest.raises(UserError, match=r"hf: it holds other files \(mine\)"):
        exported(small("llama"), tmp_path)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_sinks": True, "attention": "fused_softmax"}, "model.attention_sinks=True .* LlamaForCausalLM"),
        ({"attention_softcap": 30.0}, "model.attention_softcap=30.0"),
        ({"logit_softcap": 30.0, "qkv_bias": True}, "model.logit_softcap=30.0 .* Qwen2ForCausalLM, has None"),
        ({"attention_bias": True}, "model.attention_bias=True .* LlamaForCausalLM, has False"),
        ({"activation": "gelu"}, "model.activation=gelu"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
    ],
)
def test_what_no_architecture_has_is_refused_with_its_key(changes: dict[str, Any], says: str) -> None:
    config = small("llama").config.model_copy(update=changes)
    with pytest.raises(UserError, match=says):
        architecture_of(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_an_architecture(preset: str) -> None:
    model = preset_model(preset)
    kv, head = model.num_kv_heads or model.num_heads, model.head_dim or model.hidden_size // model.num_heads
    family = architecture_of(model.model_copy(update={"num_kv_heads": kv, "head_dim": head})).model_type
    assert preset.startswith("megatron") or family in preset or family == "gpt2"


MEMORY = """
import re, sys
from pathlib import Path
from megalm.train.exchange import export
def kilobytes(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
export(Path(sys.argv[1]), Path(sys.argv[3]), None, 1, "float32", 10**9, lambda *_: None, print)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
export(Path(sys.argv[2]), Path(sys.argv[4]), None, 1, "float32", 24 << 20, lambda *_: None, print)
print(kilobytes("VmHWM") - before)
"""


def test_an_export_takes_the_memory_of_a_shard(tmp_path: Path) -> None:
    config = small("llama").config.model_copy(update={"num_layers": 16, "hidden_size": 512, "ffn_size": 2048})
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in shapes(config).items()}
    big = save_model(tmp_path / "big" / "checkpoints", config, tensors, "a test")
    size = sum(4 * tensor.numel() for tensor in tensors.values())
    tiny = saved(small("llama"), tmp_path / "tiny")
    arguments = [str(path) for path in (tiny, big, tmp_path / "a", tmp_path / "b")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True, timeout=250
    )
    assert size > 190 << 20
    assert int(done.stdout.splitlines()[-1]) << 10 < 3 * (24 << 20), f"of {size} bytes"
