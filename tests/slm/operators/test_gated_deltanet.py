"""Gated DeltaNet against the mixer of transformers' Qwen3-Next."""

from collections.abc import Callable

import pytest
import torch
from fla.layers import GatedDeltaNet as FLALayer
from numerics import relative_rms
from oracles import decode, is_alike, matrix_flops, randomize, state_bytes, torch_model
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3NextConfig

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import GatedDeltaNet, GatedDeltaNetConfig, Sequence

WIDTH, HEAD_DIM, T = 48, 16, 75
HEADS, VALUE_SIZE = WIDTH // HEAD_DIM, 24


THEIR_CONFIG = Qwen3NextConfig(
    hidden_size=WIDTH,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    linear_num_key_heads=HEADS,
    linear_num_value_heads=HEADS,
    linear_key_head_dim=HEAD_DIM,
    linear_value_head_dim=VALUE_SIZE,
    rms_norm_eps=1e-5,
)


def in_our_form(
    theirs: nn.Module, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """Their parameters, or what `value` gives of each, under our names."""
    sizes = [HEAD_DIM, HEAD_DIM, VALUE_SIZE, VALUE_SIZE]
    return {
        "in_proj.weight": by_kind(value(theirs.in_proj_qkvz.weight), sizes),
        "beta_decay_proj.weight": by_kind(value(theirs.in_proj_ba.weight), [1, 1]),
        "convolution.weight": value(theirs.conv1d.weight),
        "A_log": value(theirs.A_log),
        "dt_bias": value(theirs.dt_bias),
        "o_norm.weight": value(theirs.norm.weight),
        "o_proj.weight": value(theirs.out_proj.weight),
    }


def by_kind(weight: Tensor, sizes: list[int]) -> Tensor:
    """Rows of `weight`, which stand head by head, ordered by q, k, v, …, and by head in these."""
    kinds = weight.unflatten(0, (HEADS, -1)).split(sizes, dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in kinds])


@pytest.fixture
def pair() -> tuple[GatedDeltaNet, nn.Module]:
    """Our operator and theirs, with the same weights."""
    model = torch_model("qwen3_next.modeling_qwen3_next")
    theirs = model.Qwen3NextGatedDeltaNet(THEIR_CONFIG, layer_idx=0)
    randomize(theirs)
    ours = GatedDeltaNet(GatedDeltaNetConfig(HEAD_DIM, VALUE_SIZE / HEAD_DIM), WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[GatedDeltaNet, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), theirs(x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, lambda parameter: parameter.grad).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_transformers(pair: tuple[GatedDeltaNet, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    cache = DynamicCache(config=THEIR_CONFIG)
    expected = [theirs(token, cache_params=cache) for token in x.split(1, dim=1)]
    assert relative_rms(decode(ours, x), torch.cat(expected, dim=1)) < 1e-6


def test_initial_values_are_those_of_fla() -> None:
    """Also inside a model, whose projections are normal(0, 0.02)."""
    model = LanguageModel(
        Architecture.parse("width=2048 vocab_size=8 | gated_deltanet(head_dim=2,expand_v=1.0)")
    )
    ours = model.layers[0].operator
    theirs = FLALayer(hidden_size=16, head_dim=2, num_heads=1024, expand_v=1)
    assert is_alike(ours.A_log.exp(), theirs.A_log.exp())
    assert is_alike(ours.dt_bias, theirs.dt_bias)
    assert ours.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [GatedDeltaNetConfig(8), GatedDeltaNetConfig(16, 1.5), GatedDeltaNetConfig(24, 1.0, 2)],
    ids=str,
)
def test_cost_is_exact(config: GatedDeltaNetConfig) -> None:
    operator = GatedDeltaNet(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation; what is stored under the key and what
    # the query asks for are read, and the correction is written, with two each.
    state = operator.init_state(1, 1).matrix
    expected = matrix_flops(operator) + 2 * operator.convolution.weight.numel() + 7 * state.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_parameters_equal_fla() -> None:
    theirs = FLALayer(hidden_size=WIDTH, head_dim=HEAD_DIM, num_heads=HEADS)
    config = GatedDeltaNetConfig(head_dim=HEAD_DIM)
    assert config.parameters(WIDTH) == sum(p.numel() for p in theirs.parameters())


def test_problems() -> None:
    assert GatedDeltaNetConfig(16).problems(WIDTH) == []
    assert GatedDeltaNetConfig(20, conv_width=1).problems(WIDTH) == [
        "gated_deltanet.head_dim: must divide the width 48, got 20",
        "gated_deltanet.conv_width: must be > 1, got 1",
    ]
    assert GatedDeltaNetConfig(16, expand_v=1.3).problems(WIDTH) == [
        "gated_deltanet.expand_v: must make head_dim 16 a whole size > 0, got 1.3"
    ]
