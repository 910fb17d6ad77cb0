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
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megalm.errors import UserError
from megalm.parallel.backend import backend
from megalm.parallel.mesh import Axis, Mesh
from megalm.parallel.part import Part
from megalm.parallel.zero.regions import Region


def boxes(part: Part, start: int, flat: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Offset in the whole parameter, a vector or matrix, and view of each box that `flat` holds, in order and without
    padding. `flat` is the stretch of the rank's own, flattened part that begins at its element `start`."""
    width = prod(part.size[1:])
    position, end = start, min(start + len(flat), part.size[0] * width)
    while position < end:
        row, column = divmod(position, width)
        if rows := 0 if column else (end - position) // width:
            size = (rows, *part.size[1:])
        else:
            size = (1, min(width - column, end - position))
        place = (row, column)[: len(size)]
        offset = tuple(first + more for first, more in zip(part.offset, place, strict=True))
        yield offset, flat[position - start :][: prod(size)].view(size)
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
    try:
        import deepspeed
        from deepspeed import ops
    except ImportError as error:
        raise UserError(
            f"parallel.zero.engine='deepspeed' needs the package deepspeed ({error}): pip install 'megalm[deepspeed]', "
            "or choose engine fsdp"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*(all_gather|reduce_scatter).*deprecated", FutureWarning)
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _groups(mesh: Mesh) -> _Groups:
    """Groups of one rank included, since DeepSpeed takes no group for all ranks."""
    if not dist.is_initialized():
        dist.init_process_group(backend(mesh.device), store=dist.HashStore(), rank=0, world_size=1)
    alone = dist.new_group([mesh.rank], use_local_synchronization=True)
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

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().narrow(0, self.start, self.count)


class DeepSpeedStage:
    """A whole model under DeepSpeed's engine: called like the model, told like a `GradientSync` what comes, and the
    optimizer of the boxes that it `held`: their parameters, moments and, after `finish`, gradients are views of its.

    `module` is on its device; its weights need not be filled, since the float32 masters come after it: fill what is
    `held`, then call `publish`. `optimizer` is an AdamW over its parameters, without state. `settings` are
    `megalm.config.deepspeed.engine_settings`. Raises UserError for settings that DeepSpeed does not take.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: Mapping[str, Part],
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        settings: dict[str, Any],
    ) -> None:
        deepspeed = load_deepspeed(mesh.device)
        self.mesh, self._utilities, self._gathered = mesh, deepspeed.utils, deepspeed.zero.GatheredParameters
        self._sharded = settings["zero_optimization"]["stage"] == 3
        self._offloaded = "offload_optimizer" in settings["zero_optimization"]
        for parameter in module.parameters():
            _marks(parameter).tensor_model_parallel = True  # else a rank may have none to count
        os.environ.setdefault("LOCAL_RANK", str(mesh.device.index or 0))  # which it insists on
        try:
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, mpu=_groups(mesh), config=settings, dist_init_required=False
            )
        except (ValueError, AssertionError) as error:  # pydantic's ValidationError is a ValueError
            raise UserError(f"deepspeed: {' '.join(str(error).split())}") from error
        self.param_groups = optimizer.param_groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self._stretches: list[tuple[nn.Parameter, _Place, Part, list[Region]]] = []
        self._complete = False
        for flat in self._flats():
            flat.detach().zero_()  # and so is what pads a vocabulary, which nobody fills
            optimizer.state[flat] = {  # which DeepSpeed leaves to the first step
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        for name, parameter in module.named_parameters():
            if place := self._place(parameter):
                regions = self._hold(name, parts[name], place, optimizer.state[place.flat])
                self._stretches.append((parameter, place, parts[name], regions))
        self.held = [region for *_, regions in self._stretches for region in regions]

    def __call__(self, *inputs: Any, scale: float = 1.0) -> Any:
        """The model's forward pass. What the engine will average over the data ranks is made larger by their number."""
        return self._engine(*inputs, scale=scale * self.mesh.data.size)

    # As a GradientSync:

    def begin(self) -> None:
        self._complete = False

    def before_backward(self, last: bool, deferred: bool) -> None:
        assert not deferred, "DeepSpeed's hooks want whole backward passes"
        self._engine.set_gradient_accumulation_boundary(last)
        self._complete = last

    def after_weights(self, last: bool) -> None:
        raise AssertionError("DeepSpeed's hooks want whole backward passes")

    def reduce(self) -> None:
        """The last backward pass did."""

    def finish(self) -> None:
        for parameter, place, part, regions in self._stretches if self._complete else ():
            flat = self._gradient(parameter, place)
            for region, (_, box) in zip(regions, boxes(part, place.first, flat), strict=True):
                region.parameter.grad = box

    # As an optimizer:

    def step(self) -> None:
        """Updates masters and weights, with the learning rates of `param_groups`."""
        self.zero_grad()
        self._engine.step()

    def zero_grad(self) -> None:
        """Lets go of the gradients, which are the engine's."""
        for region in self.held:
            region.parameter.grad = None

    def publish(self) -> None:
        """To be called on all ranks after what is `held` was filled or loaded: makes the model compute with it."""
        if not self._sharded:
            self._engine.optimizer.update_lp_params()
            return
        for parameter in self._engine.module.parameters():
            whole = self._utilities.safe_get_full_fp32_param(parameter)
            with self._gathered(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(whole)

    def _flats(self) -> list[Tensor]:
        """The flat float32 tensors that the optimizer updates."""
        if self._sharded:
            return self._engine.optimizer.fp32_partitioned_groups_flat
        return [group["params"][0] for group in self.param_groups]

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

    def _hold(self, name: str, part: Part, place: _Place, state: dict[str, Tensor]) -> list[Region]:
        """The boxes of the stretch as parameters with their state: views of what the engine updates."""
        moments = [boxes(part, place.first, place.of(state[kind])) for kind in ("exp_avg", "exp_avg_sq")]
        found = []
        for (offset, box), (_, first), (_, second) in zip(
            boxes(part, place.first, place.of(place.flat)), *moments, strict=True
        ):
            parameter = nn.Parameter(box)
            self.state[parameter] = {"step": state["step"], "exp_avg": first, "exp_avg_sq": second}
            found.append(Region(name, parameter, part, offset, tuple(box.shape), part.primary))
        return found

    def _gradient(self, parameter: nn.Parameter, place: _Place) -> Tensor:
        """The stretch of the gradient: a view."""
        if self._sharded:
            if self._offloaded:
                assert place.flat.grad is not None
                return place.of(place.flat.grad)
            return self._utilities.safe_get_local_grad(parameter)
        marks = _marks(parameter)
        flat = marks._hp_mapping.get_lp_grad_fragment(marks._index_in_param_group).view(-1)
        whole = len(flat) == parameter.numel()  # the bfloat16 optimizer has it on every rank
        return flat.narrow(0, place.first, place.count) if whole else flat
