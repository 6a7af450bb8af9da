"""The gated short convolution against that of transformers' LFM2."""

import pytest
import torch
from numerics import relative_rms
from oracles import decode, matrix_flops, randomize, state_bytes, torch_model
from torch import Tensor, nn
from transformers import DynamicCache, Lfm2Config

from slm.operators import Sequence, ShortConvolution, ShortConvolutionConfig

WIDTH, T = 48, 75

THEIR_CONFIG = Lfm2Config(hidden_size=WIDTH, num_hidden_layers=1, layer_types=["conv"])


def our_name(name: str) -> str:
    return name.replace("conv.", "convolution.")


@pytest.fixture
def pair() -> tuple[ShortConvolution, nn.Module]:
    """Our operator and theirs, with the same weights."""
    theirs = torch_model("lfm2.modeling_lfm2").Lfm2ShortConv(THEIR_CONFIG, layer_idx=0)
    randomize(theirs)
    ours = ShortConvolution(ShortConvolutionConfig(), WIDTH)
    ours.load_state_dict({our_name(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[ShortConvolution, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), theirs(x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(our_name(name)).grad
        assert relative_rms(gradient, parameter.grad) < 1e-6, name


@torch.no_grad()
def test_steps_equal_transformers(pair: tuple[ShortConvolution, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    cache = DynamicCache(config=THEIR_CONFIG)
    expected = [theirs(token, past_key_values=cache) for token in x.split(1, dim=1)]
    assert relative_rms(decode(ours, x), torch.cat(expected, dim=1)) < 1e-6


@pytest.mark.parametrize(
    "config", [ShortConvolutionConfig(), ShortConvolutionConfig(conv_width=5)], ids=str
)
def test_cost_is_exact(config: ShortConvolutionConfig) -> None:
    operator = ShortConvolution(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    expected = matrix_flops(operator) + 2 * operator.convolution.weight.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_parameters_equal_transformers(pair: tuple[ShortConvolution, nn.Module]) -> None:
    ours, theirs = pair
    expected = sum(p.numel() for p in theirs.parameters())
    assert ours.config.parameters(WIDTH) == expected


def test_problems() -> None:
    assert ShortConvolutionConfig().problems(WIDTH) == []
    assert ShortConvolutionConfig(conv_width=1).problems(WIDTH) == [
        "short_convolution.conv_width: must be > 1, got 1"
    ]
