"""Checkpoints of megatron-core and DeepSpeed compute here what they computed there; a run of ours goes on there."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import queue
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from hf_models import BASE, GPT2, TIED, exported, tokens
from peers import our_logits
from ranks import run_ranks
from runs import write_config
from torch import Tensor

from megalm.checkpoint.huggingface import VOCABULARY, to_config
from megalm.checkpoint.interop import from_megatron
from megalm.checkpoint.weights import Weights
from megalm.cli import main
from megalm.config.sections import Model
from megalm.config.text import to_yaml
from megalm.errors import UserError
from megalm.model.transformer import Transformer
from megalm.parallel.zero.deepspeed import load_deepspeed
from megalm.train.exchange import shapes

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
MEGATRON: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, norms of queries and keys": {**TIED, "qk_norm": True, "qkv_bias": True},
    "gpt": {**GPT2, "activation": "gelu"},
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def convert(tool: ModuleType, kind: str, source: Path, model: Model, output: Path) -> int:
    """Runs the tool with the config of a run with this model; gives its exit code."""
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
    return tool.main([kind, str(source), "--config", str(config), "--output", str(output)])


def converted(tool: ModuleType, kind: str, source: Path, model: Model, output: Path) -> Transformer:
    assert convert(tool, kind, source, model, output) == 0
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
def test_a_checkpoint_of_megatron_core_computes_the_same_here(name: str, tool: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "iter_0000010"
    source.mkdir()
    logits, _ = run_ranks(2, saved_by_megatron, MEGATRON[name], str(source), timeout=250)
    ours = converted(tool, "megatron", source, model_of(MEGATRON[name]), tmp_path / "start")
    assert logits.std() > 0.3
    assert (our_logits(ours, tokens()) - logits).abs().max() <= 1e-4


def saved_by_deepspeed(directory: str) -> Tensor:
    """Trains transformers' Llama for a step with DeepSpeed's ZeRO 1, saves it as a universal checkpoint, and gives its
    logits."""
    from deepspeed.checkpoint import ds_to_universal

    deepspeed = load_deepspeed(torch.device("cpu"))
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # it insists
    config = transformers.AutoConfig.for_model(**to_config(model_of({}), 256, "float32"))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    settings = {"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 1}}
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


def test_a_universal_checkpoint_of_deepspeed_computes_the_same_here(tool: ModuleType, tmp_path: Path) -> None:
    logits, _ = run_ranks(2, saved_by_deepspeed, str(tmp_path), timeout=250)
    ours = converted(tool, "deepspeed", tmp_path / "universal", model_of({}), tmp_path / "start")
    assert logits.std() > 0.3
    assert (our_logits(ours, tokens()) - logits).abs().max() <= 1e-4


STEPS, WORDS = 5, 257
KINDS = {"fp32": "model.", "exp_avg": "optimizer.exp_avg.", "exp_avg_sq": "optimizer.exp_avg_sq."}


def trained(data: Path, run: Path, *overrides: str) -> Path:
    """The last checkpoint of a short run."""
    config = write_config(data, run)
    sizes = f"schedule.steps={STEPS}", "schedule.warmup_steps=1", "schedule.decay_steps=1"
    assert main(["train", config, *sizes, *overrides]) == 0
    return run / "checkpoints" / f"step-{STEPS:08d}"


def resumed_by_deepspeed(
    directory: str, config: dict[str, Any], stage: int, of: str
) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Loads into a new model of transformers; gives what is then held of each parameter, and what the engine and its
    schedule say before and after one more step."""
    from deepspeed.runtime.lr_schedules import WarmupLR
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    deepspeed = load_deepspeed(torch.device("cpu"))
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # it insists
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).float()
    named = list(model.named_parameters())
    groups = [{"params": [p for _, p in named if p.ndim > 1]}, {"params": [p for _, p in named if p.ndim == 1]}]
    adamw = torch.optim.AdamW if of == "torch" else deepspeed.ops.adam.DeepSpeedCPUAdam
    optimizer = adamw(groups, lr=0.01, betas=(0.9, 0.98), weight_decay=0.3)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": True},
    }
    schedule = {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 50, "warmup_type": "linear"}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False,
        lr_scheduler=lambda theirs: WarmupLR(theirs, **schedule),
    )  # fmt: skip
    path, _ = engine.load_checkpoint(directory)
    assert path is not None
    held = {
        "fp32": {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named},
        **{
            kind: {name: safe_get_full_optimizer_state(parameter, kind).clone() for name, parameter in named}
            for kind in ("exp_avg", "exp_avg_sq")
        },
    }

    def said() -> dict[str, Any]:
        inner = engine.optimizer.optimizer
        return {
            "steps": [int(state["step"]) for state in inner.state.values()],
            "global": (engine.global_steps, engine.global_samples),
            "hyper": [(group["betas"], group["weight_decay"]) for group in inner.param_groups],
            "rate": [group["lr"] for group in inner.param_groups],
        }

    before = said()
    tokens = torch.arange(32).view(2, 16)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    alone = WarmupLR(torch.optim.AdamW([torch.zeros(1)]), **schedule)
    for _ in range(STEPS + 1):
        alone.step()
    return held, (before, said(), alone.get_lr())


def in_transformers(weights: Weights, directory: Path) -> dict[str, Tensor]:
    """Tensors of ours as transformers loads them, without the rows of the vocabulary that stand for no token."""
    ours = Transformer(weights.model.model_copy(update={"vocab_size": WORDS}))
    rows = {name: WORDS if name in VOCABULARY else None for name in weights.shapes}
    ours.load_state_dict({name: weights.tensor(name)[: rows[name]] for name in weights.shapes})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(ours, directory))
    return {name: parameter.detach() for name, parameter in theirs.named_parameters()}


GPT = [f"model.{key}={str(value).lower()}" for key, value in {**GPT2, **TIED, "num_kv_heads": 4}.items()]


@pytest.mark.parametrize(
    ("stage", "of", "overrides"),
    [
        pytest.param(1, "torch", [], id="llama, zero 1"),
        pytest.param(2, "torch", [*GPT, "model.vocab_size=320"], id="gpt 2, padded, zero 2"),
        pytest.param(3, "deepspeed", [], id="llama, zero 3", marks=pytest.mark.full),  # it compiles its AdamW
    ],
)
def test_deepspeed_goes_on_where_a_run_of_ours_was(
    stage: int, of: str, overrides: list[str], tool: ModuleType, data: Path, tmp_path: Path
) -> None:
    run, universal = tmp_path / "run", tmp_path / "universal"
    checkpoint = trained(data, run, *overrides)
    assert tool.main(["to_deepspeed", str(run), "--output", str(universal), "--optimizer", of]) == 0
    assert (universal / "latest_universal").read_text() == f"global_step{STEPS}_universal"
    model = Weights([checkpoint]).model.model_copy(update={"vocab_size": WORDS})
    config = to_config(model, 256, "float32")
    expected = {kind: in_transformers(Weights([checkpoint], prefix), tmp_path / kind) for kind, prefix in KINDS.items()}
    results = run_ranks(2, resumed_by_deepspeed, str(universal), config, stage, of, timeout=500)
    for held, (before, after, rate) in results:
        for kind, tensors in expected.items():
            assert held[kind].keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert tensor.any(), (kind, name)
                assert torch.equal(held[kind][name], tensor), (kind, name)
        assert set(before["steps"]) == {STEPS}
        assert set(after["steps"]) == {STEPS + 1}
        assert before["global"] == (STEPS, 8 * STEPS)
        assert before["hyper"] == [((0.9, 0.98), 0.3)] * 2
        assert after["rate"] == rate * 2

    ours = Weights([checkpoint])
    for name, parameter in converted(tool, "deepspeed", universal, model, tmp_path / "back").named_parameters():
        assert torch.equal(parameter, ours.tensor(name)[: len(parameter)]), name


def test_what_deepspeeds_loader_does_not_take_is_one_line(
    tool: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "universal"
    for name in ("adamw", "muon"):
        trained(data, tmp_path / name, f"optimizer.kind={name}")
    assert tool.main(["to_deepspeed", str(tmp_path / "muon"), "--output", str(output)]) == 2
    message = (
        r"step-00000005: has no exp_avg of layers.0.attention.key.weight: .*optimizer.kind=adamw.*megalm export\n$"
    )
    assert re.search(message, capsys.readouterr().err)
    assert not output.exists()

    arguments = ["to_deepspeed", str(tmp_path / "adamw"), "--output", str(output), "--optimizer", "deepspeed"]
    assert tool.main(arguments) == 0
    written = sorted(path.relative_to(output) for path in output.rglob("*.pt"))
    for path in (path for path in written if path.name == "step.pt"):
        assert type(torch.load(output / path, weights_only=True)) is int
    assert tool.main(arguments) == 2
    assert "holds other files (global_step5_universal)" in capsys.readouterr().err
    assert sorted(path.relative_to(output) for path in output.rglob("*.pt")) == written


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_nothing_in_a_foreign_file_is_run(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, witness = tmp_path / "iter_0000010", tmp_path / "witness"
    source.mkdir()
    (source / ".metadata").write_bytes(pickle.dumps(Harmful(witness)))
    assert convert(tool, "megatron", source, model_of({}), tmp_path / "start") == 2
    assert re.search(r"iter_0000010: its .metadata asks for \S+, .*: refused\n$", capsys.readouterr().err)
    (source / "zero" / "lm_head.weight").mkdir(parents=True)
    torch.save({"param": Harmful(witness)}, source / "zero" / "lm_head.weight" / "fp32.pt")
    assert convert(tool, "deepspeed", source, model_of({}), tmp_path / "start") == 2
    assert "fp32.pt: cannot read: Weights only load failed" in capsys.readouterr().err
    assert not witness.exists()
    assert not (tmp_path / "start").exists()


def test_what_is_damaged_or_elsewhere_is_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "iter_0000010"
    source.mkdir()
    for content, says in [(None, "No such file or directory: give the directory of one"), (b"\x80\x04", "damaged")]:
        if content:
            (source / ".metadata").write_bytes(content)
        assert convert(tool, "megatron", source, model_of({}), tmp_path / "start") == 2
        assert says in capsys.readouterr().err
    for latest in (None, b"\xff\xfe"):
        if latest:
            (source / "latest_universal").write_bytes(latest)
        assert convert(tool, "deepspeed", source, model_of({}), tmp_path / "start") == 2
        assert "has no folder zero" in capsys.readouterr().err


def megatron_tensors(model: Model) -> dict[str, Tensor]:
    """Under Megatron's names, with a padded vocabulary."""
    rows = (model.num_heads + 2 * (model.num_kv_heads or 0)) * (model.head_dim or 0)
    layer = {
        "self_attention.linear_qkv.weight": (rows, model.hidden_size),
        "self_attention.linear_qkv.layer_norm_weight": (model.hidden_size,),
        "self_attention.linear_proj.weight": (model.hidden_size, model.hidden_size),
        "mlp.linear_fc1.layer_norm_weight": (model.hidden_size,),
        "mlp.linear_fc1.weight": (2 * model.ffn_size, model.hidden_size),
        "mlp.linear_fc2.weight": (model.hidden_size, model.ffn_size),
    }
    shapes = {f"decoder.layers.{name}": (model.num_layers, *shape) for name, shape in layer.items()}
    shapes |= dict.fromkeys(("embedding.word_embeddings.weight", "output_layer.weight"), (384, model.hidden_size))
    return {name: torch.randn(shape) for name, shape in (shapes | {"decoder.final_layernorm.weight": (64,)}).items()}


@pytest.mark.parametrize(
    ("changes", "added", "says"),
    [
        (
            {},
            {"decoder.layers.mlp.linear_fc1.bias": (3, 352)},
            "has a tensor 'decoder.layers.mlp.linear_fc1.bias'",
        ),
        ({"tie_embeddings": True}, {}, "has a tensor 'output_layer.weight', for which"),
        ({"qk_norm": True}, {}, "has no tensor 'decoder.layers.self_attention.q_layernorm.weight'"),
        ({"position": "learned"}, {}, "has no tensor 'embedding.position_embeddings.weight'"),
        ({"num_kv_heads": 4}, {}, "linear_qkv has 96 rows, but .* make 128"),
        ({"ffn_size": 175}, {}, r"gate.weight is \[176, 64\], but the model section makes it \[175, 64\]"),
        (
            {"vocab_size": 100},
            {"embedding.word_embeddings.weight": (100 + (1 << 14), 64)},
            r"embedding.weight is \[16484",
        ),
        ({"num_layers": 2}, {}, "has 3 layers, but model.num_layers=2"),
        ({"num_layers": 4}, {}, "has 3 layers, but model.num_layers=4"),
        ({"attention": "fused_softmax", "attention_sinks": True}, {}, "has nothing for layers.0.attention.sinks"),
        ({"vocab_size": 385}, {}, r"embedding.weight is \[384, 64\], but the model section makes it \[385, 64\]"),
    ],
)
def test_a_model_section_that_does_not_fit_megatrons_tensors_is_refused(
    changes: dict[str, Any], added: dict[str, tuple[int, ...]], says: str
) -> None:
    tensors = megatron_tensors(model_of({})) | {name: torch.zeros(shape) for name, shape in added.items()}
    if not added.keys() & megatron_tensors(model_of({})).keys():
        said: list[str] = []
        taken = from_megatron(
            model_of({}), shapes(model_of({})), tensors.keys() - added.keys(), tensors.__getitem__, said.append
        )
        assert [f"left out {384 - len(taken['head.weight'])} rows" in line for line in said] == [True, True]
    with pytest.raises(UserError, match=says):
        from_megatron(model_of(changes), shapes(model_of(changes)), tensors, tensors.__getitem__, lambda line: None)


def test_layers_with_names_of_their_own_are_as_many_as_the_model_section_says() -> None:
    model = model_of({})
    tensors: dict[str, Tensor] = {}
    for name, tensor in megatron_tensors(model).items():
        layer = name.removeprefix("decoder.layers.")
        parts = {f"decoder.layers.{n}.{layer}": part for n, part in enumerate(tensor)} if layer != name else {}
        tensors |= parts or {name: tensor}
    assert from_megatron(model, shapes(model), tensors, tensors.__getitem__, lambda line: None)
    for layers, says in ((4, "has no tensor 'decoder.layers.3.self_attention"), (2, "has a tensor 'decoder.layers.2.")):
        other = model_of({"num_layers": layers})
        with pytest.raises(UserError, match=says):
            from_megatron(other, shapes(other), tensors, tensors.__getitem__, lambda line: None)
