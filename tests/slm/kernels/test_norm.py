"""The root mean square norm: against torch's, and its derivatives."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_rms

from slm.kernels.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 7, 48), (3, 5, 4, 16), (6,)])
def test_equals_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1], requires_grad=True)
    ours, torchs = rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), shape[-1:], weight, 1e-5)
    assert ours.dtype == dtype
    close = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_rms(ours, torchs) < close
    dy = torch.randn(shape).to(dtype)
    actual = torch.autograd.grad(ours, (x, weight), dy)
    expected = torch.autograd.grad(torchs, (x, weight), dy.float())
    for one, other in zip(actual, expected, strict=True):
        assert relative_rms(one, other) < close


def test_gradients_in_double_precision() -> None:
    """With an epsilon that counts."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.3), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
@torch.no_grad()
def test_dtypes_may_differ(
    dtype: torch.dtype, weight_dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """By torch's fused kernel: it warns where that cannot be."""
    x, weight = torch.randn(2, 3, 32).to(dtype), torch.randn(32).to(weight_dtype)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    y = rms_norm(x, weight, 1e-5)
    torch.set_warn_always(before)
    assert not recwarn.list
    assert y.dtype == dtype
    expected = F.rms_norm(x.double(), (32,), weight.double(), 1e-5)
    assert relative_rms(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_without_gradients_it_is_the_same() -> None:
    x, weight = torch.randn(2, 3, 32), torch.randn(32)
    with torch.no_grad():
        alone = rms_norm(x, weight, 1e-5)
    assert relative_rms(alone, rms_norm(x, weight, 1e-5)) < 1e-6
