"""The short convolution: against torch's, its own steps, and documents apart."""

import itertools
from collections.abc import Callable

import pytest
import torch
from numerics import relative_rms
from torch import Tensor

from slm.kernels.convolution import (
    block_causal_convolution,
    causal_convolution,
    causal_convolution_step,
    new_tail,
    torch_causal_convolution,
)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [1, 4, 5, 64])
def test_blocks_equal_torch_with_every_gradient(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block_tokens: int
) -> None:
    """Documents shorter than the window, than a block and longer; torch's sees one at a time.

    No block is smaller than the window.
    """
    channels, width = 3, 4
    monkeypatch.setattr("slm.kernels.convolution.BLOCK_BYTES", 4 * channels * block_tokens)
    inputs = [
        torch.randn(shape, dtype=dtype)
        for shape in ((2, 21, channels), (channels, width), (channels,), (1, width - 1, channels))
    ]
    cuts = [[0, 1, 3, 8, 21], [0, 10, 11, 21]]
    begins = torch.zeros(2, 21, dtype=torch.bool)
    for row, cut in enumerate(cuts):
        begins[row, cut[:-1]] = True
    weights = torch.randn(2, 21, channels, dtype=dtype)

    def run(convolution: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x, *others = (each.detach().to(dtype).requires_grad_() for each in inputs)
        y = convolution(x, *others)
        assert y.dtype == dtype
        return [y.detach(), *torch.autograd.grad(y, (x, *others), weights.to(dtype))]

    def one_at_a_time(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
        rows = [
            torch.cat(
                [
                    torch_causal_convolution(x[row : row + 1, begin:end], weight, bias, tail)
                    for begin, end in itertools.pairwise(cut)
                ],
                dim=1,
            )
            for row, cut in enumerate(cuts)
        ]
        return torch.cat(rows)

    expected = run(one_at_a_time, torch.float64)
    actual = run(lambda *given: block_causal_convolution(*given, Documents(begins)), dtype)
    names = ["output", *(f"gradient of {name}" for name in ("x", "weight", "bias", "tail"))]
    for name, ours, truth in zip(names, actual, expected, strict=True):
        assert relative_rms(ours, truth) < (1e-14 if dtype == torch.float64 else 4e-3), name


def test_blocks_of_a_part_of_what_was_projected() -> None:
    """Channels that lie between others, as operators pass them, and no tail."""
    projected = torch.randn(2, 9, 8, dtype=torch.float64)
    x, weight = projected[..., 2:5], torch.randn(3, 4, dtype=torch.float64)
    expected = torch_causal_convolution(x, weight, None, None)
    assert relative_rms(block_causal_convolution(x, weight, None, None), expected) < 1e-14


def test_tail_of_padded_rows() -> None:
    x, tail = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    actual = new_tail(x, tail, 4, torch.tensor([1, 5]))
    assert torch.equal(actual[:1], new_tail(x[:1, :1], tail[:1], 4, None))
    assert torch.equal(actual[1:], new_tail(x[1:, :5], tail[1:], 4, None))
