"""The short convolution: against torch's, its own steps, and documents apart."""

import itertools

import pytest
import torch
from numerics import relative_rms

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.documents import Documents

B = 2
CLOSE = 3e-7  # fp32: rounding only


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_convolution_equals_torch_and_its_own_steps(width: int, has_bias: bool) -> None:
    x, weight, tail = torch.randn(B, 11, 5), torch.randn(5, width), torch.randn(B, width - 1, 5)
    bias = torch.randn(5) if has_bias else None
    module = torch.nn.Conv1d(5, 5, width, groups=5, padding=width - 1, bias=has_bias)
    module.weight.data = weight.unsqueeze(1)
    if bias is not None:
        module.bias.data = bias
    expected = module(x.mT)[..., :11].mT
    assert relative_rms(causal_convolution(x, weight, bias, None), expected) < CLOSE

    with_tail = causal_convolution(x, weight, bias, tail)
    moving = tail.clone()
    steps = [causal_convolution_step(x[:, t], weight, bias, moving) for t in range(11)]
    assert relative_rms(torch.stack(steps, 1), with_tail) < CLOSE
    assert torch.equal(moving, new_tail(x, tail, width, None))


def test_convolution_of_packed_documents() -> None:
    x, weight, tail = torch.randn(1, 12, 5), torch.randn(5, 4), torch.randn(1, 3, 5)
    cuts = [0, 1, 3, 6, 12]
    begins = torch.zeros(1, 12, dtype=torch.bool)
    begins[0, cuts[:-1]] = True
    packed = causal_convolution(x, weight, None, tail, Documents(begins))
    for begin, end in itertools.pairwise(cuts):
        alone = causal_convolution(x[:, begin:end], weight, None, tail)
        assert relative_rms(packed[:, begin:end], alone) < CLOSE


def test_tail_of_padded_rows() -> None:
    x, tail = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    actual = new_tail(x, tail, 4, torch.tensor([1, 5]))
    assert torch.equal(actual[:1], new_tail(x[:1, :1], tail[:1], 4, None))
    assert torch.equal(actual[1:], new_tail(x[1:, :5], tail[1:], 4, None))
