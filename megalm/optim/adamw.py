"""AdamW with the usual groups: matrices decay; norms, biases and embeddings do not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalm.config.sections import Optimizer


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to the parameter of this name."""
    return parameter.ndim >= 2 and "embedding" not in name


def build_adamw(config: Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """Fused AdamW over parameters by name, its state allocated, so that a checkpoint can be loaded into it. Under FSDP
    the state is sharded as they are."""
    optimizer = adamw_without_state(config, named)
    for _, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def adamw_without_state(config: Optimizer, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """The same, for who keeps the state in its own way."""
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
