"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slm import weight_norm
from slm.operators import Operator
from slm.training.config import OptimizerConfig


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    max_steps: int,
    time_used: Callable[[], float] | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """Optimizer of `model`, and its schedule, to be stepped once per optimizer step.

    Only matrices decay: not norms, biases, convolutions and the like, nor what an operator keeps
    from it (`Operator.undecayed`). With `config.weight_norm` the model is projected at once and
    after each step. `time_used` gives the fraction of a time budget that is used up; the cosine
    follows it when it runs ahead of the steps.
    """
    undecayed = {
        module.get_parameter(name)
        for module in model.modules()
        if isinstance(module, Operator)
        for name in module.undecayed
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = parameter.ndim == 2 and parameter not in undecayed
        (matrices if decays else others).append(parameter)
    kind = AdamW if config.name == "adamw" else Adam
    optimizer = kind(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    if config.weight_norm:
        weight_norm.attach(optimizer, model)

    def factor(step: int) -> float:
        return lr_factor(config, step, max_steps, time_used() if time_used is not None else 0.0)

    return optimizer, LambdaLR(optimizer, factor)


def lr_factor(config: OptimizerConfig, step: int, max_steps: int, time_used: float = 0.0) -> float:
    """Learning rate of `step` (the first is 0) as a fraction of the peak.

    A line from 1 / warmup_steps to 1, then half a cosine from 1 down to `min_lr_ratio`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(max(progress, time_used), 1.0))) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine
