"""The one place where a run's parts are put together from its config, in a fixed order:

1. tokenizer   decides the vocabulary, and with it the model's last derived default
2. data        opened and checked against the tokenizer, so that mistakes in paths and sizes show before work starts
3. device
4. model       made on the meta device, moved empty, then filled: no second copy of the weights is ever alive
5. compile     each block alone, so that equal blocks share their code
6. optimizer   over the parameters where they now live
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megalm.config.sections import Config, Model, known
from megalm.data.loader import Loader, MicroBatch
from megalm.data.needs import Need
from megalm.data.open import open_run_data
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.model.counts import parameter_count
from megalm.model.init import initialise
from megalm.model.transformer import ModelInputs, Recompute, Transformer
from megalm.optim.adamw import moments
from megalm.optim.build import build_optimizer
from megalm.parallel.mesh import Mesh
from megalm.parallel.zero.regions import regions
from megalm.train.device import DTYPES, pick_device, total_memory

BYTES_A_PARAMETER = 16  # float32: parameter, gradient, two moments


@dataclass(frozen=True)
class Inputs:
    """What a run reads, all of it checked."""

    config: Config
    tokenizer: Tokenizer
    loader: Loader
    needs: list[Need]
    device: torch.device


@dataclass(frozen=True)
class Parts:
    """What a run changes."""

    model: Transformer
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        named = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        return named | dict(moments(self.optimizer, self.model))


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


def build_inputs(config: Config) -> Inputs:
    """Steps 1 to 3: raises a UserError for whatever is wrong, and writes nothing."""
    data, device = open_run_data(config), pick_device(config.run.device)
    config = with_vocabulary(config, data.tokenizer)
    _check_memory(config.model, device)
    return Inputs(config, data.tokenizer, data.loader, data.needs, device)


def _check_memory(model: Model, device: torch.device) -> None:
    needed, there = parameter_count(model, known(model.vocab_size)) * BYTES_A_PARAMETER, total_memory(device)
    if needed > there:
        raise UserError(
            f"model: parameters, gradients and optimizer state take {needed / 2**30:,.0f} GiB, but the {device.type} "
            f"has {there / 2**30:,.0f} GiB of memory: choose a smaller model.preset, hidden_size or num_layers"
        )


def build_parts(config: Config, device: torch.device) -> Parts:
    """Steps 4 to 6."""
    model = build_model(config.model, device, DTYPES[config.precision.compute], config.run.recompute)
    initialise(model, config.run.seed)
    if config.run.compile:
        for block in model.layers.values():
            block.compile()
    held = regions(model, model.parts, Mesh())
    return Parts(model, build_optimizer(config.optimizer, held, Mesh()))


def build_model(
    config: Model, device: torch.device, compute: torch.dtype, recompute: Recompute = "none"
) -> Transformer:
    """An uninitialised model on `device`."""
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
