"""Mamba2 against the mixer of transformers."""

import pytest
import torch
from numerics import relative_rms
from oracles import decode, is_alike, matrix_flops, randomize, state_bytes, torch_model
from torch import Tensor, nn
from transformers import DynamicCache
from transformers import Mamba2Config as TheirConfig

from slm.operators import Mamba2, Mamba2Config, Sequence

WIDTH, HEAD_DIM, STATE_SIZE, T = 48, 16, 24, 75

THEIR_CONFIG = TheirConfig(
    hidden_size=WIDTH,
    num_hidden_layers=1,
    head_dim=HEAD_DIM,
    num_heads=2 * WIDTH // HEAD_DIM,
    state_size=STATE_SIZE,
    n_groups=1,
    chunk_size=32,
)


def our_name(name: str) -> str:
    return name.replace("conv1d", "convolution")


@pytest.fixture
def pair() -> tuple[Mamba2, nn.Module]:
    """Our operator and theirs, with the same weights."""
    theirs = torch_model("mamba2.modeling_mamba2").Mamba2Mixer(THEIR_CONFIG, layer_idx=0)
    randomize(theirs)
    ours = Mamba2(Mamba2Config(head_dim=HEAD_DIM, state_size=STATE_SIZE), WIDTH)
    ours.load_state_dict({our_name(name): value for name, value in theirs.state_dict().items()})
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[Mamba2, nn.Module], x: Tensor) -> None:
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
def test_steps_equal_transformers(pair: tuple[Mamba2, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    cache = DynamicCache(config=THEIR_CONFIG)
    expected = [theirs(token, cache_params=cache) for token in x.split(1, dim=1)]
    assert relative_rms(decode(ours, x), torch.cat(expected, dim=1)) < 1e-6


def test_initial_step_sizes_are_those_of_transformers() -> None:
    """A is not: it is uniform in [1, 16], as in Nemotron-Flash and the authors' own code."""
    ours = Mamba2(Mamba2Config(head_dim=1, state_size=1), 1024)
    config = TheirConfig(
        hidden_size=1024, num_hidden_layers=1, head_dim=1, num_heads=2048, state_size=1, n_groups=1
    )
    theirs = torch_model("mamba2.modeling_mamba2").Mamba2Mixer(config, layer_idx=0)
    assert is_alike(ours.dt_bias, theirs.dt_bias)
    assert is_alike(ours.A_log.exp(), torch.empty(2048).uniform_(1.0, 16.0))


@pytest.mark.parametrize(
    "config", [Mamba2Config(1, 8, 24, 2), Mamba2Config(head_dim=16, state_size=8)], ids=str
)
def test_cost_is_exact(config: Mamba2Config) -> None:
    operator = Mamba2(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation, its write and its read two each.
    state = operator.init_state(1, 1).matrix
    expected = matrix_flops(operator) + 2 * operator.convolution.weight.numel() + 5 * state.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_parameters_equal_transformers(pair: tuple[Mamba2, nn.Module]) -> None:
    ours, theirs = pair
    expected = sum(p.numel() for p in theirs.parameters())
    assert ours.config.parameters(WIDTH) == expected
