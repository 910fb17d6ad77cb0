"""A model's parameters out of checkpoints and into one, a tensor at a time: for those who have no run around them.

    ROOT/step-00000100 (and the K - 1 before it) --> Weights.tensor(name), or their mean --> another format
    another format --> save_model --> ROOT/step-00000000, whose state has the model section and no run

Only what is complete is read; a checkpoint that a run in progress removes meanwhile ends in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megalm.checkpoint.manifest import DamagedCheckpoint, read_manifest
from megalm.checkpoint.places import Place, names
from megalm.checkpoint.reader import read_tensor
from megalm.checkpoint.shard import whole
from megalm.checkpoint.writer import save
from megalm.config.sections import Model
from megalm.errors import UserError

PREFIX = "model."


@dataclass
class Weights:
    """The parameters in `directories`, of one model at several steps: their mean, or those of the only one."""

    directories: Sequence[Place]
    prefix: str = PREFIX
    """What is before the parameters' names: that of another kind gives the optimizer's state of each, all the same."""
    state: dict[str, Any] = field(init=False)
    """What the first one holds besides tensors."""
    steps: list[int] = field(init=False)
    """Of the directories, in their order."""
    shapes: dict[str, tuple[int, ...]] = field(init=False)
    """By the parameters' names."""

    def __post_init__(self) -> None:
        self._manifests = [self._guarded(directory, read_manifest, directory) for directory in self.directories]
        self.state, tensors = self._manifests[0].state, self._manifests[0].tensors
        self.steps = [manifest.step for manifest in self._manifests]
        prefix = self.prefix
        self.shapes = {n.removeprefix(prefix): record.shape for n, record in tensors.items() if n.startswith(prefix)}

    @property
    def model(self) -> Model:
        """The resolved model section."""
        return Model.model_validate(model_section(self.state))

    def tensor(self, name: str) -> Tensor:
        """A parameter, verified; a mean is accumulated in float64."""
        places = zip(self.directories, self._manifests, strict=True)
        found = (self._guarded(place, read_tensor, place, manifest, self.prefix + name) for place, manifest in places)
        first = next(found)
        if len(self.directories) == 1:
            return first
        total = first.double()
        for tensor in found:
            total += tensor
        return first.copy_(total / len(self.directories))

    def _guarded(self, directory: Place, read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except DamagedCheckpoint as damage:
            if names(directory):
                raise
            raise UserError(
                f"{directory}: was removed while it was read, as its run keeps only the newest: do it again, with a "
                "newer step or a higher checkpoint.keep"
            ) from damage


def model_section(state: Mapping[str, Any]) -> dict[str, Any]:
    """The model section that a checkpoint is of, a run's or one that `save_model` wrote."""
    return state["config"]["model"] if "config" in state else state["model"]


def save_model(
    root: Path, model: Model, tensors: Mapping[str, Tensor], source: str, tokenizer: str | None = None
) -> Place:
    """Writes `root`/step-00000000 of parameters alone, in float32, to start a run from.

    `source` says where they are from; `tokenizer` is the fingerprint of the one that came with them.
    """
    state = {"model": model.model_dump(mode="json"), "source": source, "tokenizer": tokenizer}
    return save(root, 0, whole({PREFIX + name: tensor for name, tensor in tensors.items()}), state, keep=1)
