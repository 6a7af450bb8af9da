"""Kimi Delta Attention against the mixer of transformers' Kimi Linear."""

from collections.abc import Callable

import pytest
import torch
from fla.layers import KimiDeltaAttention as FLALayer
from numerics import relative_rms
from oracles import decode, is_alike, matrix_flops, randomize, state_bytes, torch_model
from torch import Tensor, nn
from transformers import DynamicCache, KimiLinearConfig

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import KDA, KDAConfig, Sequence

WIDTH, HEAD_DIM, T = 48, 16, 75
HEADS = WIDTH // HEAD_DIM

THEIR_CONFIG = KimiLinearConfig(
    hidden_size=WIDTH,
    num_hidden_layers=1,
    layer_types=["linear_attention"],
    linear_head_dim=HEAD_DIM,
    linear_num_heads=HEADS,
    rms_norm_eps=1e-5,
)


def in_our_form(
    theirs: nn.Module, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """Their parameters, or what `value` gives of each, under our names."""
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    return {
        "qkv_proj.weight": torch.cat([value(projection.weight) for projection in projections]),
        "beta_proj.weight": value(theirs.b_proj.weight),
        "decay_down_proj.weight": value(theirs.forget_gate.f_a_proj.weight),
        "decay_up_proj.weight": value(theirs.forget_gate.f_b_proj.weight),
        "gate_down_proj.weight": value(theirs.g_a_proj.weight),
        "gate_up_proj.weight": value(theirs.g_b_proj.weight),
        "convolution.weight": value(theirs.conv1d.weight),
        "A_log": value(theirs.forget_gate.A_log).flatten(),
        "dt_bias": value(theirs.forget_gate.dt_bias),
        "o_norm.weight": value(theirs.o_norm.weight),
        "o_proj.weight": value(theirs.o_proj.weight),
    }


@pytest.fixture
def pair() -> tuple[KDA, nn.Module]:
    """Our operator and theirs, with the same weights."""
    model = torch_model("kimi_linear.modeling_kimi_linear")
    theirs = model.KimiLinearDeltaAttention(THEIR_CONFIG, layer_idx=0)
    randomize(theirs)
    ours = KDA(KDAConfig(HEAD_DIM), WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[KDA, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), theirs(x)
    assert relative_rms(actual, expected) < 2e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, lambda parameter: parameter.grad).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_transformers(pair: tuple[KDA, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    cache = DynamicCache(config=THEIR_CONFIG)
    expected = [theirs(token, cache_params=cache) for token in x.split(1, dim=1)]
    assert relative_rms(decode(ours, x), torch.cat(expected, dim=1)) < 1e-6


def test_initial_values_are_those_of_fla() -> None:
    """Also inside a model, whose projections are normal(0, 0.02)."""
    model = LanguageModel(Architecture.parse("width=2048 vocab_size=8 | kda(head_dim=2)"))
    ours = model.layers[0].operator
    theirs = FLALayer(hidden_size=16, head_dim=2, num_heads=1024)
    assert is_alike(ours.A_log.exp(), theirs.A_log.exp())
    assert is_alike(ours.dt_bias, theirs.dt_bias)
    assert ours.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("config", [KDAConfig(8), KDAConfig(24, 2)], ids=str)
def test_cost_is_exact(config: KDAConfig) -> None:
    operator = KDA(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation; what is stored under the key and what
    # the query asks for are read, and the correction is written, with two each.
    state = operator.init_state(1, 1).matrix
    expected = matrix_flops(operator) + 2 * operator.convolution.weight.numel() + 7 * state.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_parameters_equal_transformers(pair: tuple[KDA, nn.Module]) -> None:
    ours, theirs = pair
    expected = sum(p.numel() for p in theirs.parameters())
    assert ours.config.parameters(WIDTH) == expected


def test_problems() -> None:
    assert KDAConfig(16).problems(WIDTH) == []
    assert KDAConfig(20, conv_width=1).problems(WIDTH) == [
        "kda.head_dim: must divide the width 48, got 20",
        "kda.conv_width: must be > 1, got 1",
    ]
