"""The short causal convolution: each channel mixes its last W inputs.

    y_t = b + Σ_j w_j x_{t − W + 1 + j},    j = 0 … W − 1

Letters: B rows, T tokens, D channels, W width of the window.
x [B, T, D]; weight [D, W]; bias [D] or None; tail [B|1, W − 1, D]: the inputs before the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import fla_function, run_fla_packed, use_fla
from slm.kernels.documents import Documents
from slm.kernels.precision import accumulation_dtype

FLA = "modules.causal_conv1d.causal_conv1d"
# Of a block of inputs, at 4 bytes each: with what comes of them it stays in a core's cache.
BLOCK_BYTES = 2**18


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """Convolve rows, by fla on CUDA, by blocks on a CPU, else by torch; y [B, T, D].

    Each of `documents`, or without them each row, begins with `tail`. None stands for zeros.
    """
    if use_fla("convolution", x, FLA):
        return fla_causal_convolution(x, weight, bias, tail, documents)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return block_causal_convolution(x, weight, bias, tail, documents)
    return torch_causal_convolution(x, weight, bias, tail, documents)


def fla_causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """By the Triton kernel of fla, whose states are [B, D, W] and begin with a value unused."""
    start = None if tail is None else F.pad(tail.to(x.dtype).transpose(1, 2), (1, 0))
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    function = fla_function(FLA)
    y, _ = run_fla_packed(function, {"x": x}, start, documents, weight=weight, bias=bias)
    return y


def torch_causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """By torch's convolution; with documents, one input of the window after the other."""
    channels, width = weight.shape
    padded = with_tail(x, tail, width)
    if documents is None:
        y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels)
        # Laid out as its input: what comes after it goes token by token.
        return y.transpose(1, 2).contiguous()

    ages, weight = documents.ages, weight.to(x.dtype)
    y = x * weight[:, -1]
    before_document = padded[:, : width - 1]
    for shift in range(1, width):
        lagged = padded[:, width - 1 - shift : padded.shape[1] - shift]
        place = (width - 1 - shift + ages).clamp(max=width - 2)
        from_tail = before_document.gather(1, place.unsqueeze(-1).expand(-1, -1, channels))
        lagged = torch.where((ages >= shift).unsqueeze(-1), lagged, from_tail)
        y = y + lagged * weight[:, -1 - shift]
    return y if bias is None else y + bias.to(x.dtype)


def block_causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """By elementwise products of some tokens at a time, in at least fp32.

    On a CPU torch's convolution wants its channels apart, and takes longer to lay them out, there
    and back, than to convolve.
    """
    batch_size, num_tokens, channels = x.shape
    if tail is None:
        tail = x.new_zeros(1, weight.shape[1] - 1, channels)
    lengths = [num_tokens] * batch_size if documents is None else documents.lengths
    blocks = list(_blocks(lengths, num_tokens, max(weight.shape[1], BLOCK_BYTES // (4 * channels))))
    return _BlockConvolution.apply(x, weight, bias, tail.expand(batch_size, -1, -1), blocks)


class _Block(NamedTuple):
    """Some tokens of a document: from `begin` to before `end` in all rows laid end to end."""

    begin: int
    end: int
    row: int
    is_first: bool
    is_last: bool


def _blocks(lengths: list[int], row_tokens: int, most: int) -> Iterator[_Block]:
    """Those of documents one after the other."""
    first = 0
    for length in lengths:
        after = first + length
        for begin in range(first, after, most):
            end = min(begin + most, after)
            yield _Block(begin, end, first // row_tokens, begin == first, end == after)
        first = after


class _BlockConvolution(torch.autograd.Function):
    """∂x_s = Σ_j w_j ∂y_{s + W − 1 − j} and ∂w_j = Σ_t x_{t − W + 1 + j} ∂y_t."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tail: Tensor,
        blocks: list[_Block],
    ) -> Tensor:
        """See `block_causal_convolution`."""
        ctx.save_for_backward(x, weight, bias, tail)
        ctx.blocks = blocks
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        w = weight.T.to(accumulation_dtype(x)).contiguous()
        X, Y = x.flatten(0, 1), y.flatten(0, 1)
        for block in blocks:
            window, L = _window(X, tail, block), block.end - block.begin
            convolved = window[:L] * w[0]
            for j in range(1, len(w)):
                convolved.addcmul_(window[j : j + L], w[j])
            Y[block.begin : block.end] = convolved if bias is None else convolved.add_(bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, weight, bias and tail."""
        x, weight, bias, tail = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        w = weight.T.to(accumulation_dtype(x)).contiguous()
        dw, d_tail = torch.zeros_like(w), torch.zeros_like(tail, dtype=w.dtype)
        X, dX, dY = (each.flatten(0, 1) for each in (x, dx, dy))
        before = len(w) - 1
        d_before = torch.zeros_like(w[1:])
        for block in reversed(ctx.blocks):
            window, L = _window(X, tail, block), block.end - block.begin
            dy_block = dY[block.begin : block.end].to(w.dtype)
            d_window = torch.empty_like(window)
            # Of the last tokens, which the document's next block looks back on.
            d_window[L:] = 0.0 if block.is_last else d_before
            torch.mul(dy_block, w[0], out=d_window[:L])
            for j in range(1, len(w)):
                d_window[j : j + L].addcmul_(dy_block, w[j])
            for j in range(len(w)):
                dw[j] += (window[j : j + L] * dy_block).sum(0)
            dX[block.begin : block.end] = d_window[before:]
            d_before = d_window[:before]
            if block.is_first:
                d_tail[block.row] += d_before
        d_bias = None if bias is None else dY.sum(0, dtype=w.dtype).to(bias.dtype)
        return dx, dw.T.to(weight.dtype), d_bias, d_tail.to(tail.dtype), None


def _window(X: Tensor, tail: Tensor, block: _Block) -> Tensor:
    """[W − 1 + L, D]: what a block of L tokens sees, in at least fp32."""
    before = tail.shape[1]
    window = X.new_empty(before + block.end - block.begin, X.shape[1], dtype=accumulation_dtype(X))
    begin = block.begin
    window[:before] = tail[block.row] if block.is_first else X[begin - before : begin]
    window[before:] = X[begin : block.end]
    return window


def with_tail(x: Tensor, tail: Tensor | None, width: int) -> Tensor:
    """[B, W − 1 + T, D]: the inputs before the first token, then x."""
    if tail is None:
        return F.pad(x, (0, 0, width - 1, 0))
    return torch.cat([tail.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)


def new_tail(x: Tensor, tail: Tensor | None, width: int, lengths: Tensor | None) -> Tensor:
    """The last W − 1 inputs [B, W − 1, D] of each row, of which `lengths` [B] tokens are real."""
    padded = with_tail(x, tail, width)
    if lengths is None:
        return padded[:, x.shape[1] :]
    place = lengths[:, None] + torch.arange(width - 1, device=x.device)
    return padded.gather(1, place.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def causal_convolution_step(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> Tensor:
    """One token x [B, D]: y [B, D]; moves `tail` on in place."""
    window = torch.cat([tail, x.unsqueeze(1)], dim=1)
    tail.copy_(window[:, 1:])
    y = (window * weight.T).sum(dim=1)
    return y if bias is None else y + bias
