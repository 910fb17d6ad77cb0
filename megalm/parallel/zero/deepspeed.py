"""DeepSpeed's engine in the place of FSDP2: the same model, with the same tensor-parallel layers, under ZeRO 1 to 3.

    FSDP2        each rank holds rows of each parameter
    DeepSpeed    each rank holds a stretch of each flattened parameter, from anywhere to anywhere: up to three boxes

        . . . . .
        . . 1 1 1      what a rank holds of a 5 x 5 matrix
        2 2 2 2 2
        2 2 2 2 2
        3 . . . .

The engine gathers, reduces and updates; norms, clipping and the learning rate are the trainer's. Its hooks count on one
micro-batch in flight, so each goes forward and straight back: no pipeline. Only this file imports deepspeed, which may
not be installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.errors import UserError
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.part import Part


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, or of what belongs to it, that this rank alone of the data ranks holds."""

    name: str
    tensor: Tensor
    """float32, of the box's size."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    offset: tuple[int, ...]
    primary: bool

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def pieces(name: str, part: Part, start: int, flat: Tensor) -> Iterator[Piece]:
    """The boxes that `flat` holds of a vector or matrix: views, in order, without padding. `flat` is the stretch of the
    rank's own, flattened part that begins at its element `start`."""
    width = prod(part.size[1:])
    position, end = start, min(start + len(flat), part.size[0] * width)
    while position < end:
        row, column = divmod(position, width)
        if whole_rows := (end - position) // width if column == 0 else 0:
            size = (whole_rows, *part.size[1:])
        else:
            size = (1, min(width - column, end - position))
        inner = (row, column)[: len(size)]
        offset = tuple(base + more for base, more in zip(part.offset, inner, strict=True))
        box = flat[position - start : position - start + prod(size)].view(size)
        yield Piece(name, box, part.shape, offset, part.primary)
        position += prod(size)


@dataclass(frozen=True)
class _Groups:
    """What DeepSpeed asks a model-parallel unit for."""

    data: Axis
    tensor: Axis
    data_group: ProcessGroup
    tensor_group: ProcessGroup

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.data_group


def load_deepspeed(device: torch.device) -> ModuleType:
    """The package, quiet, and without the kernels that it would compile for minutes at the first collective."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it takes a GPU wherever there is one
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        import deepspeed
        from deepspeed import ops
    except ImportError as error:
        raise UserError(
            f"parallel.zero.engine='deepspeed' needs the package deepspeed ({error}): pip install 'megalm[deepspeed]', "
            "or choose engine fsdp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _groups(mesh: Mesh) -> _Groups:
    """Groups of one rank included, since DeepSpeed takes no group for all ranks."""
    if not dist.is_initialized():
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    alone = [dist.new_group([rank]) for rank in range(mesh.layout.size)][mesh.rank]
    return _Groups(mesh.data, mesh.tensor, mesh.data.group or alone, mesh.tensor.group or alone)


def _marks(parameter: nn.Parameter) -> Any:
    """The parameter, on which DeepSpeed writes its own attributes."""
    return parameter


@dataclass(frozen=True)
class _Place:
    """A rank's stretch of a parameter: `count` elements from `first` of the flattened parameter, of which `flat` holds
    the float32 masters from `start` on. The last rank's may be longer than the parameter."""

    flat: Tensor
    start: int
    first: int
    count: int


class DeepSpeedStage:
    """A model under DeepSpeed's engine: called like the model, and told like a `GradientSync` what comes.

    `module` is on its device; its weights need not be filled, since the float32 masters come after it: fill what
    `masters` gives, then call `publish`. `optimizer` is an AdamW over its parameters, without state. `settings` are
    `megalm.config.deepspeed.engine_settings`. Raises UserError for settings that DeepSpeed does not take.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, Part],
        mesh: Mesh,
        settings: dict[str, Any],
    ) -> None:
        deepspeed = load_deepspeed(mesh.device)
        self.module, self.optimizer, self.parts, self.mesh = module, optimizer, parts, mesh
        self._access, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        self._sharded = settings["zero_optimization"]["stage"] == 3
        for parameter in module.parameters():
            _marks(parameter).tensor_model_parallel = True  # else a rank may have none to count
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, mpu=_groups(mesh), config=settings, dist_init_required=False
            )
        except (ValueError, AssertionError) as error:  # pydantic's ValidationError is a ValueError
            raise UserError(f"deepspeed: {' '.join(str(error).split())}") from error
        self._parameters = dict(module.named_parameters())
        self._lent: list[tuple[str | None, nn.Parameter, Tensor]] = []
        self._make_state()

    def __call__(self, *inputs: Any, scale: float = 1.0) -> Any:
        """The model's forward pass. What the engine will average over the data ranks is made larger by their number."""
        return self._engine(*inputs, scale=scale * self.mesh.data.size)

    # As a GradientSync:

    def begin(self) -> None:
        """The step before left no gradients."""

    def before_backward(self, last: bool, deferred: bool) -> None:
        """The last backward pass completes the gradients."""
        assert not deferred, "DeepSpeed's hooks want whole backward passes"
        self._engine.set_gradient_accumulation_boundary(last)

    def after_weights(self, last: bool) -> None:
        raise AssertionError("DeepSpeed's hooks want whole backward passes")

    def reduce(self) -> None:
        """The last backward pass did."""

    def finish(self) -> None:
        """`gradients` has them, and no parameter's `.grad`."""

    # As an optimizer:

    def gradients(self) -> list[Piece]:
        """What this rank has of the gradients, which are sums over the data ranks; change it in place, then `step`."""
        return self._pieces(self._gradient)

    def step(self) -> None:
        """Updates masters and weights, with the learning rates of `optimizer.param_groups`; forgets the gradients."""
        if self._sharded:
            for _, parameter, flat in self._lent:
                self._access.safe_set_local_grad(parameter, flat)
        self._lent.clear()
        self._engine.step()

    # As what is filled at the start, saved and loaded:

    def masters(self) -> list[Piece]:
        """This rank's float32 parameters. What is written to them takes effect with `publish`."""
        return self._pieces(partial(self._state, None))

    def moments(self, kind: str) -> list[Piece]:
        """As `masters`, this rank's AdamW state: `exp_avg` or `exp_avg_sq`."""
        return self._pieces(partial(self._state, kind))

    def steps(self) -> list[Piece]:
        """As `masters`, AdamW's count of steps: one for each parameter, primary where its first element is."""
        return [
            Piece(
                name,
                self.optimizer.state[place.flat]["step"],
                (),
                (),
                part.primary and not place.first + sum(part.offset),
            )
            for name, part in self.parts.items()
            if (place := self._place(self._parameters[name]))
        ]

    def publish(self) -> None:
        """Takes over what was written to masters and moments, and makes the model compute with it, on all ranks."""
        if not self._sharded:
            self._lent.clear()  # they are views
            self._engine.optimizer.update_lp_params()
            return
        for kind, parameter, flat in self._lent:
            if kind is None:
                self._access.safe_set_local_fp32_param(parameter, flat)
            else:
                self._access.safe_set_local_optimizer_state(parameter, flat, kind)
        self._lent.clear()
        for parameter in self._parameters.values():
            whole = self._access.safe_get_full_fp32_param(parameter)
            with self._gathered(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(whole)

    def _make_state(self) -> None:
        """AdamW's state, which DeepSpeed leaves to the first step."""
        for flat in self._flats():
            self.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }

    def _flats(self) -> list[Tensor]:
        """The flat tensors that the optimizer updates."""
        if self._sharded:
            return self._engine.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.optimizer.param_groups]

    def _place(self, parameter: nn.Parameter) -> _Place | None:
        """Where this rank's stretch of the parameter is; None if it has none."""
        if self._sharded:
            zero = self._engine.optimizer
            group, start, count = zero.grad_position[zero.get_param_id(parameter)]
            first = count * self.mesh.data.rank
            return _Place(self._flats()[group], start, first, count) if first < _marks(parameter).ds_numel else None
        if (mapping := _marks(parameter)._hp_mapping) is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(self._flats()[mapping.param_group_index], here.start, there.start, here.numel)

    def _pieces(self, stretch: Callable[[nn.Parameter, _Place], Tensor]) -> list[Piece]:
        found: list[Piece] = []
        for name, part in self.parts.items():
            if place := self._place(self._parameters[name]):
                found += pieces(name, part, place.first, stretch(self._parameters[name], place))
        return found

    def _state(self, kind: str | None, parameter: nn.Parameter, place: _Place) -> Tensor:
        """A view, or where the state rests elsewhere a copy that `publish` takes back."""
        if not self._sharded:
            flat = place.flat if kind is None else self.optimizer.state[place.flat][kind]
            return flat.detach().narrow(0, place.start, place.count)
        access = self._access
        if kind is None:
            flat = access.safe_get_local_fp32_param(parameter).detach()
        else:
            flat = access.safe_get_local_optimizer_state(parameter, kind)
        self._lent.append((kind, parameter, flat))
        return flat

    def _gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        """A view, or where the gradient rests elsewhere a copy that `step` takes back."""
        if not self._sharded:
            marks = _marks(parameter)
            flat = marks._hp_mapping.get_lp_grad_fragment(marks._index_in_param_group).view(-1)
            whole = len(flat) == parameter.numel()  # the bfloat16 optimizer has it on every rank
            return flat.narrow(0, place.first, place.count) if whole else flat
        flat = self._access.safe_get_local_grad(parameter)
        self._lent.append((None, parameter, flat))
        return flat
