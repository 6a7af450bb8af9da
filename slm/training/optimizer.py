"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from slm import weight_norm
from slm.operators import Operator
from slm.training.config import OptimizerConfig


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    max_steps: int,
    tokens_per_step: int,
    time_used: Callable[[], float] | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """Optimizer of `model`, and its schedule, to be stepped once per optimizer step.

    Only matrices decay: not norms, biases, convolutions and the like, nor what an operator keeps
    from it (`Operator.undecayed`). With `config.weight_norm` the model is projected at once and
    after each step. `time_used` gives the fraction of a time budget that is used up; the schedule
    follows it when it runs ahead of the steps.
    """
    matrices, others = _matrices(model)
    decay = config.weight_decay
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    optimizer: Optimizer
    if config.name == "muon":
        hidden = [p for name, p in matrices.items() if name.startswith("layers.")]
        outer = [p for name, p in matrices.items() if not name.startswith("layers.")]
        optimizer = MuonAdamW(
            Muon(
                hidden,
                lr=config.lr,
                weight_decay=decay,
                momentum=config.momentum,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(_groups(outer, others, decay), fused=True, **settings),
        )
    else:
        kind = AdamW if config.name == "adamw" else Adam
        optimizer = kind(_groups(matrices.values(), others, decay), fused=True, **settings)
    if config.weight_norm:
        weight_norm.attach(optimizer, model, embeddings=config.weight_norm_embeddings)

    def factor(step: int) -> float:
        used = time_used() if time_used is not None else 0.0
        return lr_factor(config, step, max_steps, tokens_per_step, used)

    return optimizer, LambdaLR(optimizer, factor)


def lr_factor(
    config: OptimizerConfig,
    step: int,
    max_steps: int,
    tokens_per_step: int,
    time_used: float = 0.0,
) -> float:
    """Learning rate of `step` (the first is 0) as a fraction of the peak.

    A line from one step's share of the warm-up to 1, then what `config.schedule` says.
    """
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_tokens / tokens_per_step)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(max_steps - warmup_steps, 1)
    progress = min(max(progress, time_used), 1.0)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        fallen = (1 - math.cos(math.pi * progress)) / 2
    else:
        fallen = max(0.0, 1 - (1 - progress) / config.decay_share)
    return 1 - (1 - config.min_lr_ratio) * fallen


class MuonAdamW(Optimizer):
    """Muon and AdamW as one optimizer, each of its own parameter groups."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.parts: list[Optimizer] = [muon, adamw]
        self.lengths = [len(part.param_groups) for part in self.parts]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One step of both.

        Where `found_inf` tells of gradients that are not finite (`slm.training.guard`), AdamW
        leaves its step out, and Muon goes on with its momentum.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None:
            for group in self.param_groups[: self.lengths[0]]:
                for parameter in group["params"]:
                    parameter.grad.masked_fill_(found_inf.bool(), 0.0)
        begin = 0
        for part, length in zip(self.parts, self.lengths, strict=True):
            # Loading a checkpoint gives this optimizer new groups and another state.
            part.param_groups = self.param_groups[begin : begin + length]
            part.state = self.state
            if found_inf is not None:
                part.grad_scale, part.found_inf = None, found_inf  # type: ignore[attr-defined]
            part.step()
            begin += length
        return loss


def _matrices(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[nn.Parameter]]:
    """The parameters that decay, by name, and the others."""
    undecayed = {
        module.get_parameter(name)
        for module in model.modules()
        if isinstance(module, Operator)
        for name in module.undecayed
    }
    matrices: dict[str, nn.Parameter] = {}
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and parameter not in undecayed:
            matrices[name] = parameter
        else:
            others.append(parameter)
    return matrices, others


def _groups(
    matrices: Iterable[nn.Parameter], others: list[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    return [
        {"params": list(matrices), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
