"""Matrix products of one token as multiply-and-sum, for the compiler to fuse and vectorise.

A product of a matrix with one vector reads the matrix once and is bound by memory. Libraries are
made for products of matrices: on a CPU their one-token products reach a third of the memory's
speed. Written as a sum, the compiler turns them into one loop over the matrix's rows, along with
what stands around them (norms, gates, states). Of several tokens the library is as fast or faster:
a feed-forward network of width 384 takes 0.25 ms for two either way, for four 0.30 ms by the
library and 0.45 ms as sums.

Of large matrices the compiler's loop, which takes one row after the other, does not keep the memory
busy, and the product is C++ of ours, `matrix_vector.cpp`: a feed-forward network of width 768 takes
0.65 ms instead of 0.82 on two threads. Of small ones, which the caches hold, the loop is faster.

`DECOMPOSITIONS` rewrites an exported step so.

Letters: B rows, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slm.kernels.precision import accumulation_dtype

aten = torch.ops.aten

# From here on a matrix's product is our own kernel's.
LARGE_BYTES = 5 * 2**19
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
KERNEL = Path(__file__).with_suffix(".cpp")


@torch.library.custom_op("slm::matrix_vector", mutates_args=())
def matrix_vector(weight: Tensor, x: Tensor, threads: int) -> Tensor:
    """y [O] fp32 of weight [O, I], fp32 or bf16, and x [I] fp32: what the kernel computes."""
    return (weight.float() * x).sum(-1)


@matrix_vector.register_fake
def _(weight: Tensor, x: Tensor, threads: int) -> Tensor:
    return x.new_empty(weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [..., O] of x [..., I] and weight [O, I]; of one row as a sum, or by the kernel."""
    if x.numel() == x.shape[-1]:
        row = x.flatten().to(accumulation_dtype(x))
        if _has_kernel(weight):
            y = matrix_vector(weight, row, torch.get_num_threads())
        else:
            y = (weight.to(row.dtype) * row).sum(-1)
        y = y.to(x.dtype).expand(*x.shape[:-1], -1)
    else:
        y = (x.flatten(0, -2) @ weight.T).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def _has_kernel(weight: Tensor) -> bool:
    is_large = weight.numel() * weight.itemsize >= LARGE_BYTES
    return is_large and weight.dtype in KERNEL_DTYPES and weight.is_contiguous()


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """[B, T, O] of a [B, T, I] and b [B, I, O]; of one token, T or O is one."""
    wide = accumulation_dtype(a)
    return (a.unsqueeze(-1).to(wide) * b.unsqueeze(1).to(wide)).sum(2).to(a.dtype)


DECOMPOSITIONS = {
    aten.linear.default: linear,
    aten.bmm.default: batched_matmul,
}
