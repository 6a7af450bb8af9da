"""SwiGLU: against its definition, and its derivatives."""

import torch
import torch.nn.functional as F
from numerics import relative_rms

from slm.kernels.swiglu import swiglu


def test_equals_its_definition_with_and_without_gradients() -> None:
    gate_up = torch.randn(3, 5, 14)
    expected = F.silu(gate_up[..., :7]) * gate_up[..., 7:]
    assert relative_rms(swiglu(gate_up), expected) < 1e-6
    with torch.no_grad():
        assert relative_rms(swiglu(gate_up), expected) < 1e-6


def test_gradients_in_double_precision() -> None:
    gate_up = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
