"""Checkpoints that megatron-core and DeepSpeed wrote compute here what they computed there."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import BASE, GPT2, TIED, tokens
from peers import our_logits
from ranks import run_ranks
from torch import Tensor

from megalm.checkpoint.huggingface import to_config
from megalm.checkpoint.weights import Weights
from megalm.config.sections import Model
from megalm.config.text import to_yaml
from megalm.model.transformer import Transformer
from megalm.parallel.zero.deepspeed import load_deepspeed

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
MEGATRON: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, norms of queries and keys": {**TIED, "qk_norm": True, "qkv_bias": True},
    "gpt": {**GPT2, "activation": "gelu"},
}


def convert(kind: str, source: Path, model: Model, output: Path) -> subprocess.CompletedProcess[str]:
    """Runs the tool with the config of a run with this model."""
    config = output.with_suffix(".yaml")
    sections = {
        "run": {"dir": str(output / "run")},
        "model": model.model_dump(mode="json"),
        "tokenizer": {"path": "byte"},
        "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "nowhere"}]},
        "batch": {"global_size": 8},
        "schedule": {"steps": 10},
    }
    config.write_text(to_yaml(sections))
    command = [sys.executable, str(TOOL), kind, str(source), "--config", str(config), "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def converted(kind: str, source: Path, model: Model, output: Path) -> Transformer:
    done = convert(kind, source, model, output)
    assert done.returncode == 0, done.stderr
    weights = Weights([output / "checkpoints" / "step-00000000"])
    ours = Transformer(weights.model)
    ours.load_state_dict({name: weights.tensor(name) for name in weights.shapes})
    return ours


def model_of(changes: dict[str, Any]) -> Model:
    return Model(**{**BASE, "num_kv_heads": 2, "vocab_size": 257, **changes})


def saved_by_megatron(changes: dict[str, Any], directory: str) -> Tensor:
    """Builds, randomises and saves megatron-core's model of this shape on two tensor ranks; gives its logits."""
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.cuda.synchronize = lambda *_: None  # it asks for a GPU where it needs none
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()  # for dropout, of which is none
    filesystem_async._results_queue = queue.Queue()  # what it sends to the process itself needs no other one
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it forks, and joins
    model = model_of(changes)
    parallel_state.initialize_model_parallel(2)
    gated = model.activation == "swiglu"
    config = TransformerConfig(
        tensor_model_parallel_size=2, num_layers=model.num_layers, hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads, num_query_groups=model.num_kv_heads, ffn_hidden_size=model.ffn_size,
        gated_linear_unit=gated, activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=model.ffn_bias, add_qkv_bias=model.qkv_bias, qk_layernorm=model.qk_norm,
        normalization="RMSNorm" if gated else "LayerNorm", layernorm_epsilon=model.norm_eps, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=model.qk_norm)
    theirs = GPTModel(
        config, spec, vocab_size=384, max_sequence_length=model.max_positions, parallel_output=False,
        position_embedding_type="rope" if model.position == "rope" else "learned_absolute",
        share_embeddings_and_output_weights=model.tie_embeddings,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            rank = parallel_state.get_tensor_model_parallel_rank() if split else 0
            seed = sum(map(ord, name)) + rank
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.1 * noise)
    dist_checkpointing.save(theirs.sharded_state_dict(), directory)
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return theirs(ids, positions, mask)[..., : model.vocab_size]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.full), *list(MEGATRON)[1:]])
def test_a_checkpoint_of_megatron_core_computes_the_same_here(name: str, tmp_path: Path) -> None:
    source = tmp_path / "iter_0000010"
    source.mkdir()
    logits, _ = run_ranks(2, saved_by_megatron, MEGATRON[name], str(source), timeout=250)
    ours = converted("megatron", source, model_of(MEGATRON[name]), tmp_path / "start")
    assert logits.std() > 0.3
    assert (our_logits(ours, tokens()) - logits).abs().max() <= 1e-4


def saved_by_deepspeed(directory: str) -> Tensor:
    """Trains transformers' Llama for a step with DeepSpeed's ZeRO 1, saves it as a universal checkpoint, and gives its
    logits."""
    from deepspeed.checkpoint import ds_to_universal

    deepspeed = load_deepspeed(torch.device("cpu"))
    config = transformers.AutoConfig.for_model(**to_config(model_of({}), 256, "float32"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    settings = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=settings, dist_init_required=False
    )
    engine.backward(engine(input_ids=tokens(), labels=tokens()).loss)
    engine.step()
    engine.save_checkpoint(directory, tag="normal", client_state={"universal_checkpoint_info": {}})
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        source, target = f"{directory}/normal", f"{directory}/universal"
        arguments = ["--input_folder", source, "--output_folder", target, "--num_extract_workers", "1"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["ds_to_universal", *arguments, "--num_merge_workers", "1"])
            ds_to_universal.main(ds_to_universal.parse_arguments())
    with torch.no_grad():
        return model(tokens()).logits


def test_a_universal_checkpoint_of_deepspeed_computes_the_same_here(tmp_path: Path) -> None:
    logits, _ = run_ranks(2, saved_by_deepspeed, str(tmp_path), timeout=250)
    ours = converted("deepspeed", tmp_path / "universal", model_of({}), tmp_path / "start")
    assert logits.std() > 0.3
    assert (our_logits(ours, tokens()) - logits).abs().max() <= 1e-4
