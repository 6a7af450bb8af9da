"""RWKV-7 against the parts of fla's layer, the first one of a model."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fla.layers import RWKV7Attention
from fla.modules.token_shift import token_shift_ref
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
from fla.ops.rwkv7.fused_k_update import k_update_ref
from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
from numerics import relative_rms
from oracles import decode, matrix_flops, randomize, state_bytes
from torch import Tensor, nn

from slm.operators import RWKV7, RWKV7Config, Sequence

WIDTH, HEAD_DIM, T = 48, 16, 75

GATES = {"w": "w_lora", "a": "a_lora", "g": "g_lora"}


def in_our_form(
    theirs: nn.Module, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """Their parameters, or what `value` gives of each, under our names."""
    mixes = (theirs.x_r, theirs.x_w, theirs.x_k, theirs.x_v, theirs.x_a, theirs.x_g)
    found = {
        "mix": torch.cat([value(mix) for mix in mixes]),
        "r_k": value(theirs.r_k).flatten(),
        "norm_weight": value(theirs.g_norm.weight),
        "norm_bias": value(theirs.g_norm.bias),
    }
    for name in ("k_k", "k_a"):
        found[name] = value(theirs.get_parameter(name))
    for name in ("r_proj", "k_proj", "v_proj", "o_proj"):
        found[f"{name}.weight"] = value(theirs.get_parameter(f"{name}.weight"))
    for ours, name in GATES.items():
        down, _, up = theirs.get_submodule(name).lora
        found[f"{ours}_down_proj.weight"] = value(down.weight)
        found[f"{ours}_up_proj.weight"] = value(up.weight)
        if up.bias is not None:
            found[f"{ours}_up_proj.bias"] = value(up.bias)
    return found


def build_theirs(width: int, head_dim: int) -> nn.Module:
    return RWKV7Attention(hidden_size=width, head_dim=head_dim, layer_idx=0, num_hidden_layers=24)


@pytest.fixture
def pair() -> tuple[RWKV7, nn.Module]:
    """Our operator and fla's layer, with the same weights."""
    theirs = build_theirs(WIDTH, HEAD_DIM)
    randomize(theirs)
    ours = RWKV7(RWKV7Config(HEAD_DIM), WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def layer_of_parts(layer: nn.Module, x: Tensor) -> Tensor:
    """What fla's layer computes, with its torch references in place of its Triton kernels."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (layer.num_heads, -1))

    x_r, x_w, x_k, x_v, x_a, x_g = torch_addcmul_rwkv7(
        x,
        token_shift_ref(x),
        layer.x_r,
        layer.x_w,
        layer.x_k,
        layer.x_v,
        layer.x_a,
        layer.x_g,
    )
    r, k, v = layer.r_proj(x_r), layer.k_proj(x_k), layer.v_proj(x_v)
    w = -0.6065306597126334 * layer.w_lora(x_w).sigmoid()
    a, g = layer.a_lora(x_a).sigmoid(), layer.g_lora(x_g)
    kk = F.normalize(heads(k * layer.k_k), dim=-1)
    k = k_update_ref(k, a, layer.k_a)
    r, w, k, v, a = (heads(y) for y in (r, w, k, v, a))
    inputs = (y.transpose(1, 2) for y in (r, k, v, -kk, kk * a, w))
    o, _ = dplr_recurrence(*inputs)
    o = (o * layer.head_dim**0.5).transpose(1, 2)
    o = layer.g_norm(o.flatten(0, 1).flatten(1)).view_as(x)
    return layer.o_proj(gate_output_correction_ref(o, r, k, layer.r_k, v, g))


def test_rows_equal_fla(pair: tuple[RWKV7, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), layer_of_parts(theirs, x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, lambda parameter: parameter.grad).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_fla(pair: tuple[RWKV7, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    assert relative_rms(decode(ours, x), layer_of_parts(theirs, x)) < 1e-6


# Ranks smaller and, for the last, larger than the width.
@pytest.mark.parametrize(("width", "head_dim"), [(128, 64), (96, 16), (24, 12)])
def test_initial_values_are_those_of_fla(width: int, head_dim: int) -> None:
    """All but the weight of the norm, which in theirs follows from the depth."""
    ours = RWKV7(RWKV7Config(head_dim), width)
    expected = in_our_form(build_theirs(width, head_dim))
    actual = dict(ours.named_parameters())
    assert actual.keys() == expected.keys()
    assert (actual.pop("norm_weight") == 1.0).all()
    for name, value in actual.items():
        theirs = expected[name]
        if value.dim() == 2 and theirs.any():
            # Orthogonal, and random otherwise.
            short = min(value.shape)
            value, theirs = (
                y @ y.T if len(y) == short else y.T @ y for y in (value.detach(), theirs)
            )
        torch.testing.assert_close(value.detach(), theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("config", [RWKV7Config(8), RWKV7Config(24)], ids=str)
def test_cost_is_exact(config: RWKV7Config) -> None:
    operator = RWKV7(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation; what is removed and what r asks for
    # are read, the removal and the new value are written, with two each.
    state = operator.init_state(1, 1).matrix
    assert config.flops_per_token(WIDTH, 9) == matrix_flops(operator) + 9 * state.numel()


@pytest.mark.parametrize(("width", "head_dim"), [(48, 16), (768, 64), (2048, 128)])
def test_parameters_equal_fla(width: int, head_dim: int) -> None:
    with torch.device("meta"):
        theirs = build_theirs(width, head_dim)
    expected = sum(p.numel() for p in theirs.parameters())
    assert RWKV7Config(head_dim).parameters(width) == expected


def test_problems() -> None:
    assert RWKV7Config(16).problems(WIDTH) == []
    for head_dim in (1, 20):
        assert RWKV7Config(head_dim).problems(WIDTH) == [
            f"rwkv7.head_dim: must be > 1 and divide the width 48, got {head_dim}"
        ]
