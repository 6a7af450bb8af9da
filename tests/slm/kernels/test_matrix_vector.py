"""Products of one token as sums, against the operations that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_rms

from slm.kernels.matrix_vector import attend, batched_matmul, linear

DTYPES = [torch.float64, torch.bfloat16]


def bound(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (3, 24), (2, 3, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(10, 24, dtype=dtype)
    bias = torch.randn(10, dtype=dtype) if has_bias else None
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    assert relative_rms(actual, F.linear(x, weight, bias)) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "o"), [(1, 5), (4, 1), (4, 5)])
def test_batched_matmul(t: int, o: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(3, t, 24, dtype=dtype), torch.randn(3, 24, o, dtype=dtype)
    assert relative_rms(batched_matmul(a, b), torch.bmm(a, b)) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend(groups: int, dtype: torch.dtype) -> None:
    q = torch.randn(2, 4, 1, 16, dtype=dtype)
    k, v = torch.randn(2, 2, groups, 30, 16, dtype=dtype)
    mask = torch.rand(2, 1, 1, 30) < 0.7
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=groups < 4
    )
    assert relative_rms(attend(q, k, v, mask, enable_gqa=groups < 4), expected) < bound(dtype)
