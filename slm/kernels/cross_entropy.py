"""The loss of a linear head over a large vocabulary, without all of its logits at once.

    L = mean_i (log Σ_v exp(z_iv) − z_i,t_i),    z = h Wᵀ, each column over its norm if so wished

Tokens go in chunks, and the gradients of a chunk, (softmax(z) − onehot(t)) W and its transpose's
product with h, are computed beside its loss, so that logits live for one chunk only (Wijmans et al.
2024, "Cut Your Losses in Large-Vocabulary Language Models", on why logits take most memory).

Letters: N tokens, D width, V vocabulary.
hidden [N, D]; weight [V, D]; row_norms [V] or None; targets [N] int64. Products are computed in the
dtype of autocast, if that is on, and all else in at least fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import fla_function, use_fla
from slm.kernels.precision import accumulation_dtype

FLA = "modules.fused_linear_cross_entropy.fused_linear_cross_entropy_loss"

# Logits of a chunk: little enough for caches, but of enough tokens for fast products and for the
# weight's gradient, which every chunk adds to, to be touched seldom.
CHUNK_BYTES = 8 * 2**20
MIN_CHUNK_TOKENS = 512


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, row_norms: Tensor | None, targets: Tensor
) -> Tensor:
    """Mean cross-entropy in nats, fp32; by fla on CUDA where gradients are wanted.

    row_norms: what logits are divided by; gradients flow through it, too.
    """
    if row_norms is not None:
        weight = weight / row_norms.unsqueeze(-1)
    if torch.is_grad_enabled() and use_fla("cross_entropy", hidden, FLA):
        return fla_linear_cross_entropy(hidden, weight, targets)
    return chunk_linear_cross_entropy(hidden, weight, targets)


def chunk_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """By chunks of tokens; None: of as many as CHUNK_BYTES allow, or MIN_CHUNK_TOKENS."""
    if chunk_tokens is None:
        logits_bytes = len(weight) * accumulation_dtype(hidden).itemsize
        chunk_tokens = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // logits_bytes)
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, chunk_tokens)


def fla_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By the Triton kernels of fla."""
    dtype, loss = product_dtype(hidden), cast("Callable[..., Tensor]", fla_function(FLA))
    with torch.autocast(hidden.device.type, enabled=False):
        return loss(hidden.to(dtype), targets, weight.to(dtype))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x are computed in: that of autocast, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradients of its inputs, which are no larger than these."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
    ) -> Tensor:
        """See `linear_cross_entropy`."""
        total = hidden.new_zeros((), dtype=accumulation_dtype(hidden))
        needs_gradients = any(ctx.needs_input_grad)
        if needs_gradients:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight)
        W = weight.to(dtype)
        parts = (x.split(chunk_tokens) for x in (hidden, targets.unsqueeze(-1)))
        for index, (h, target) in enumerate(zip(*parts, strict=True)):
            h = h.to(dtype)
            logits = (h @ W.T).to(total.dtype)
            log_p = logits.log_softmax(-1)
            total -= log_p.gather(-1, target).sum()
            if not needs_gradients:
                continue
            d_logits = log_p.exp_()
            d_logits.scatter_add_(-1, target, d_logits.new_full(target.shape, -1.0))
            d_logits = d_logits.to(dtype)
            begin = index * chunk_tokens
            d_hidden[begin : begin + len(h)] = d_logits @ W
            d_weight += d_logits.T @ h
        if needs_gradients:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.num_tokens = len(hidden)
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of hidden and weight."""
        scale = gradient / ctx.num_tokens
        return *(x * scale for x in ctx.saved_tensors), None, None, None
