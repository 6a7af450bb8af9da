"""Gradient clipping that also keeps numbers that are not finite out of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


@torch.no_grad()
def clip_and_guard(
    optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float | None
) -> Tensor:
    """Clip the gradients, and have the optimizer leave its next step out if they are not finite.

    The host does not wait for the device: fused optimizers read `found_inf`, as when a gradient
    scaler sets it, and then change neither weights nor moments.

    Returns whether they are, on the device; the same on all ranks.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    is_finite = norm.isfinite()
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    return is_finite
