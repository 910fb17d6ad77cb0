"""The optimizer that a config names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalm.config.sections import Optimizer
from megalm.optim.adamw import build_adamw
from megalm.optim.muon import Muon
from megalm.parallel.mesh import Mesh
from megalm.parallel.zero.regions import Region


def build_optimizer(config: Optimizer, held: Sequence[Region], mesh: Mesh) -> torch.optim.Optimizer:
    """Over the regions of all this rank's stages, its state allocated. Muon communicates, here and in each step."""
    if config.kind == "muon":
        return Muon(config, held, mesh)
    return build_adamw(config, [(region.name, region.parameter) for region in held])
