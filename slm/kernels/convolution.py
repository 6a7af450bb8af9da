"""The short causal convolution: each channel mixes its last W inputs.

    y_t = b + Σ_j w_j x_{t − W + 1 + j},    j = 0 … W − 1

Letters: B rows, T tokens, D channels, W width of the window.
x [B, T, D]; weight [D, W]; bias [D] or None; tail [B|1, W − 1, D]: the inputs before the first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.kernels.backend import fla_function, run_fla_packed, use_fla
from slm.kernels.documents import Documents

FLA = "modules.causal_conv1d.causal_conv1d"


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    documents: Documents | None = None,
) -> Tensor:
    """Convolve rows, by fla on CUDA and by torch elsewhere; y [B, T, D].

    Each of `documents`, or without them each row, begins with `tail`. None stands for zeros.
    """
    run = fla_causal_convolution if use_fla("convolution", x, FLA) else torch_causal_convolution
    return run(x, weight, bias, tail, documents)


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
