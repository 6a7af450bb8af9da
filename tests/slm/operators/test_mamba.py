"""Mamba against the mixer of transformers."""

import pytest
import torch
from numerics import relative_rms
from oracles import decode, is_alike, matrix_flops, randomize, state_bytes, torch_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import MambaConfig as TheirConfig

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import Mamba, MambaConfig, Sequence

# No multiple of 16: the rank of the step size is rounded up.
WIDTH, T = 40, 75


def build_theirs(width: int) -> nn.Module:
    config = TheirConfig(hidden_size=width, num_hidden_layers=1)
    return torch_model("mamba.modeling_mamba").MambaMixer(config, layer_idx=0)


def our_name(name: str) -> str:
    return name.replace("conv1d", "convolution").replace("dt_proj.", "dt_")


@pytest.fixture
def pair() -> tuple[Mamba, nn.Module]:
    """Our operator and theirs, with the same weights."""
    theirs = build_theirs(WIDTH)
    randomize(theirs)
    ours = Mamba(MambaConfig(), WIDTH)
    ours.load_state_dict({our_name(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[Mamba, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), theirs(x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in theirs.named_parameters():
        gradient = ours.get_parameter(our_name(name)).grad
        assert relative_rms(gradient, parameter.grad) < 1e-5, name


@torch.no_grad()
def test_steps_equal_transformers(pair: tuple[Mamba, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    cache = DynamicCache(config=theirs.config)
    expected = [theirs(token, cache_params=cache) for token in x.split(1, dim=1)]
    assert relative_rms(decode(ours, x), torch.cat(expected, dim=1)) < 1e-6


def test_initial_values_are_those_of_transformers() -> None:
    """Also inside a model, whose projections are normal(0, 0.02)."""
    model = LanguageModel(Architecture.parse("width=512 vocab_size=8 | mamba"))
    ours, theirs = model.layers[0].operator, build_theirs(512)
    torch.testing.assert_close(ours.A_log, theirs.A_log)
    torch.testing.assert_close(ours.D, theirs.D)
    assert is_alike(ours.dt_weight, theirs.dt_proj.weight)
    assert is_alike(ours.dt_bias, theirs.dt_proj.bias)
    assert ours.x_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("config", [MambaConfig(), MambaConfig(3, 5, 2)], ids=str)
def test_cost_is_exact(config: MambaConfig) -> None:
    operator = Mamba(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation, its write and its read two each.
    state = operator.init_state(1, 1).matrix
    expected = matrix_flops(operator) + 2 * operator.dt_weight.numel()
    expected += 2 * operator.convolution.weight.numel() + 5 * state.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_problems() -> None:
    assert MambaConfig().problems(WIDTH) == []
    assert MambaConfig(0, 0, 1).problems(WIDTH) == [
        "mamba.expand: must be > 0, got 0",
        "mamba.state_size: must be > 0, got 0",
        "mamba.conv_width: must be > 1, got 1",
    ]
