"""The one place where a run's parts are put together from its config, in a fixed order:

1. tokenizer   decides the vocabulary, and with it the model's last derived default
2. data        opened and checked against the tokenizer, so that mistakes in paths and sizes show before work starts
3. device, and the plan of stages
4. mesh        the groups of ranks, once all ranks agree on all of the above
5. stages      those of this rank, on the meta device
6. ZeRO        shards them there, so that no rank ever holds what is not its own
7. weights     moved empty to the device, then filled: no second copy of them is ever alive
8. compile     each block alone, so that equal blocks share their code
9. optimizer   over the parameters where they now live
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor

from megalm.checkpoint import Place
from megalm.config.deepspeed import engine_settings
from megalm.config.sections import Config, Model, Parallel, known
from megalm.data.loader import Loader, MicroBatch
from megalm.data.needs import Need
from megalm.data.open import open_run_data
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.launch.ranks import Process
from megalm.model.counts import parameter_count
from megalm.model.init import fill, initialise
from megalm.model.transformer import ModelInputs, Recompute, Stage, Transformer
from megalm.optim.adamw import adamw_without_state
from megalm.optim.build import build_optimizer
from megalm.parallel.mesh import Layout, Mesh, build_mesh
from megalm.parallel.part import Part
from megalm.parallel.pipeline.p2p import warm_up
from megalm.parallel.tensor.axis import TensorParallel
from megalm.parallel.weight_gradients import WeightGradientQueue
from megalm.parallel.zero.costs import memory
from megalm.parallel.zero.deepspeed import DeepSpeedStage, load_deepspeed
from megalm.parallel.zero.fsdp import shard_stage
from megalm.parallel.zero.regions import Region, regions
from megalm.parallel.zero.sync import GradientSync, NoSync
from megalm.train.device import DTYPES, pick_device, total_memory
from megalm.train.passes import Passes
from megalm.train.stages import Stages, plan_stages

BYTES_A_PARAMETER = 16  # float32: parameter, gradient, two moments


@dataclass(frozen=True)
class Inputs:
    """What a run reads, all of it checked."""

    config: Config
    tokenizer: Tokenizer
    loader: Loader
    needs: list[Need]
    device: torch.device
    stages: Stages
    initial: Place | None = None
    """The checkpoint that a new run takes its weights from."""


@dataclass(frozen=True)
class Parts:
    """What a run changes: this rank's share."""

    mesh: Mesh
    passes: Passes
    optimizer: torch.optim.Optimizer | DeepSpeedStage
    held: list[Region]
    """Its parameters, of all its stages."""

    def publish(self) -> None:
        """After a checkpoint was loaded into what is `held`: makes the stages compute with it."""
        if isinstance(self.optimizer, DeepSpeedStage):
            self.optimizer.publish()


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """`config` with `model.vocab_size` derived from the tokenizer, or checked against it."""
    rows = config.model.vocab_size or tokenizer.vocab_size
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={rows} is smaller than the vocabulary of tokenizer.path={config.tokenizer.path}: "
            f"use {tokenizer.vocab_size} or more, or leave it out"
        )
    model = config.model.model_copy(update={"vocab_size": rows})
    return config.model_copy(update={"model": model})


def build_inputs(config: Config, process: Process | None = None) -> Inputs:
    """Steps 1 to 3: raises a UserError for whatever is wrong, and writes nothing."""
    data, device = open_run_data(config), pick_device(config.run.device, process.local_rank if process else 0)
    if config.parallel.zero.engine == "deepspeed":
        load_deepspeed(device)
    config = with_vocabulary(config, data.tokenizer)
    _check_memory(config, device)
    return Inputs(config, data.tokenizer, data.loader, data.needs, device, plan_stages(config))


def bytes_of_a_rank(config: Config) -> int:
    """What a rank's share of parameters, gradients and optimizer state takes at least, layers shared out evenly."""
    layout, model = layout_of(config.parallel), config.model
    vocabulary = known(model.vocab_size) * model.hidden_size
    ends = vocabulary if model.tie_embeddings else 2 * vocabulary
    layer = (parameter_count(model, known(model.vocab_size)) - ends) // model.num_layers // layout.tensor
    layers, root = model.num_layers // layout.pipeline, ends // layout.tensor // layout.pipeline
    if layout.data == 1:
        return (layers * layer + root) * BYTES_A_PARAMETER
    stage, compute = config.parallel.zero.stage, DTYPES[config.precision.compute].itemsize
    return memory([[(layer,)]] * layers, [(root,)], stage, layout.data_shard, 2, compute).total


def _check_memory(config: Config, device: torch.device) -> None:
    if config.parallel.zero.offload != "none":
        return  # the host's memory is shared by as many ranks as the launcher starts there
    needed = bytes_of_a_rank(config)
    if device.type == "cpu":  # whose ranks may share a machine, which holds the whole
        needed = parameter_count(config.model, known(config.model.vocab_size)) * BYTES_A_PARAMETER
    there = total_memory(device)
    if needed > there:
        raise UserError(
            f"model: parameters, gradients and optimizer state take {needed / 2**30:,.0f} GiB, but the {device.type} "
            f"has {there / 2**30:,.0f} GiB of memory: choose a smaller model.preset, hidden_size or num_layers, "
            "or more ranks to share it"
        )


def layout_of(parallel: Parallel) -> Layout:
    """The mesh's axes."""
    data = parallel.data
    assert isinstance(data, int), "only a resolved config may be used"
    shard = known(parallel.zero.shard)  # 1 with ZeRO 0: all data ranks are replicas
    return Layout(parallel.pipeline.size, data // shard, shard, parallel.tensor)


def build_parts(inputs: Inputs) -> Parts:
    """Steps 4 to 9, on all ranks of the default process group; with a layout of one process there is none."""
    config, device, plan = inputs.config, inputs.device, inputs.stages
    mesh = _mesh(config, device)
    stages, syncs = _stages(config, mesh, plan), {}
    for number, stage in stages.items():
        if config.parallel.zero.engine == "deepspeed":
            return _under_deepspeed(config, stage.to_empty(device=device), mesh, plan)
        syncs[number] = shard_stage(stage, mesh, config.parallel.zero, stage.compute)
        offloaded = config.parallel.zero.offload == "cpu" and mesh.data.size > 1
        stage.to_empty(device="cpu" if offloaded else device)
        initialise(stage, config.run.seed)
        for block in stage.layers.values() if config.run.compile else ():
            block.compile()
    passes = Passes(stages, syncs, mesh, config.parallel.pipeline, plan)
    held = held_by(passes)
    return Parts(mesh, passes, build_optimizer(config.optimizer, held, mesh), held)


def build_passes(config: Config, device: torch.device, plan: Stages) -> Passes:
    """Steps 4 to 7 for a model that no step changes, its weights left empty. Only ZeRO 3 shards it: what rests whole on
    each data rank in a training step does so always."""
    mesh = _mesh(config, device)
    stages, zero = _stages(config, mesh, plan), config.parallel.zero
    syncs: dict[int, GradientSync] = {}
    for number, stage in stages.items():
        syncs[number] = shard_stage(stage, mesh, zero, stage.compute) if zero.stage == 3 else NoSync()
        stage.to_empty(device=device)
        stage.requires_grad_(False)
    return Passes(stages, syncs, mesh, config.parallel.pipeline, plan)


def held_by(passes: Passes) -> list[Region]:
    """The parameters of all stages on this rank, at rest."""
    return [region for stage in passes.stages.values() for region in regions(stage, stage.parts, passes.mesh)]


def _mesh(config: Config, device: torch.device) -> Mesh:
    layout = layout_of(config.parallel)
    if layout.size == 1:
        return Mesh(device=device)
    copies = max(1, layout.tensor // known(config.model.num_kv_heads))
    mesh = build_mesh(layout, device, timedelta(seconds=config.run.timeout), copies)
    warm_up(mesh)
    return mesh


def _stages(config: Config, mesh: Mesh, plan: Stages) -> dict[int, Transformer]:
    """Those of this rank, on the meta device."""
    parallel, compute = config.parallel, DTYPES[config.precision.compute]
    sequence = parallel.sequence_sharding and mesh.tensor.size > 1
    tp = TensorParallel(mesh.tensor, sequence, parallel.tensor_overlap, WeightGradientQueue())
    stages = {}
    for number, (first, end) in enumerate(plan.bounds):
        if plan.placement[number] == mesh.pipeline.rank:
            stage = Stage(first, end, number == 0, number == len(plan.bounds) - 1)
            with torch.device("meta"):
                stages[number] = Transformer(config.model, compute, config.run.recompute, tp, stage)
    return stages


def _under_deepspeed(config: Config, model: Transformer, mesh: Mesh, plan: Stages) -> Parts:
    """Steps 6, 7 and 9 where DeepSpeed's engine shards and updates; it makes the masters, so weights come after it."""
    adamw = adamw_without_state(config.optimizer, list(model.named_parameters()))
    engine = DeepSpeedStage(model, model.parts, adamw, mesh, engine_settings(config))
    for region in engine.held:
        part = Part(region.part.shape, region.offset, region.size)
        fill(region.parameter, config.model, config.run.seed, region.name, part)
    engine.publish()
    passes = Passes({0: model}, {0: engine}, mesh, config.parallel.pipeline, plan, {0: engine})
    return Parts(mesh, passes, engine, engine.held)


def build_model(
    config: Model, device: torch.device, compute: torch.dtype, recompute: Recompute = "none"
) -> Transformer:
    """An uninitialised model on `device`, whole."""
    with torch.device("meta"):
        model = Transformer(config, compute, recompute)
    return model.to_empty(device=device)


def model_inputs(batch: MicroBatch, device: torch.device, keys_B: Tensor | None = None) -> ModelInputs:
    """What `Transformer.forward` takes; the ends stay on the CPU."""
    arrays = (batch.tokens_T, batch.positions_T, batch.labels_T, batch.loss_mask_T)
    tokens_T, positions_T, labels_T, counted_T = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
    return ModelInputs(tokens_T, positions_T, torch.from_numpy(batch.segments), labels_T, counted_T, keys_B)


def pinned(batch: MicroBatch) -> MicroBatch:
    """The same in page-locked memory, from which a GPU copies while the CPU goes on."""

    def lock(array: np.ndarray) -> np.ndarray:
        return torch.from_numpy(array).pin_memory().numpy()

    return replace(
        batch,
        tokens_T=lock(batch.tokens_T),
        labels_T=lock(batch.labels_T),
        loss_mask_T=lock(batch.loss_mask_T),
        positions_T=lock(batch.positions_T),
    )
