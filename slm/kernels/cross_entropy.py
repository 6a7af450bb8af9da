"""The loss of a linear head over a large vocabulary, without all of its logits at once.

    L = mean_i (log Σ_v exp(z_iv) − z_i,t_i),    z = h Wᵀ, each column over its norm if so wished

Tokens go in chunks, and the gradients of a chunk, (softmax(z) − onehot(t)) W and its transpose's
product with h, are computed beside its loss, so that logits live for one chunk only (Wijmans et al.
2024, "Cut Your Losses in Large-Vocabulary Language Models", on why logits take most memory). What
is elementwise goes in blocks of a chunk.

Letters: N tokens, D width, V vocabulary.
hidden [N, D]; weight [V, D]; row_norms [V] or None; targets [N] int64. Products are computed in the
dtype of autocast, if that is on, and all else in at least fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import fla_function, use_fla
from slm.kernels.precision import accumulation_dtype

FLA = "modules.fused_linear_cross_entropy.fused_linear_cross_entropy_loss"

# Enough for fast products, and for the weight's gradient, which every chunk adds to, to be touched
# seldom.
CHUNK_TOKENS = 512
# Logits of a block stay in the cache, where that leaves it enough tokens.
BLOCK_BYTES = 2 * 2**20
MIN_BLOCK_TOKENS = 128


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
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    block_tokens: int | None = None,
) -> Tensor:
    """By chunks of tokens, and blocks of these; None: as many as BLOCK_BYTES allow."""
    if block_tokens is None:
        logits_bytes = len(weight) * accumulation_dtype(hidden).itemsize
        block_tokens = max(MIN_BLOCK_TOKENS, BLOCK_BYTES // logits_bytes)
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(
            hidden, weight, targets.unsqueeze(-1), dtype, chunk_tokens, block_tokens
        )


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
        block_tokens: int,
    ) -> Tensor:
        """See `chunk_linear_cross_entropy`; targets [N, 1]."""
        total = hidden.new_zeros((), dtype=accumulation_dtype(hidden))
        needs_gradients = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight if needs_gradients else weight[:0])
        W = weight.to(dtype)
        # For all chunks: so much memory is new every time it is asked for, and slow at first touch.
        buffer = W.new_empty(min(chunk_tokens, len(hidden)), len(W))
        for h, dh, target in _split(chunk_tokens, hidden, d_hidden, targets):
            h, d_logits = h.to(dtype), buffer[: len(h)]
            for x, dz, t in _split(block_tokens, h, d_logits, target):
                log_p = (x @ W.T).to(total.dtype).log_softmax(-1)
                total -= log_p.gather(-1, t).sum()
                if needs_gradients:
                    p = log_p.exp_()
                    dz.copy_(p.scatter_add_(-1, t, p.new_full(t.shape, -1.0)))
            if needs_gradients:
                dh.copy_(d_logits @ W)
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
        return *(x * scale for x in ctx.saved_tensors), None, None, None, None


def _split(num_tokens: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of so many tokens of each tensor [N, ...] in turn."""
    return zip(*(x.split(num_tokens) for x in tensors), strict=True)
