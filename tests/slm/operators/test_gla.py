"""Gated linear attention against the parts of fla's layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fla.layers import GatedLinearAttention
from fla.modules.layernorm_gated import rms_norm_ref
from fla.ops.gla.naive import naive_recurrent_gla
from numerics import relative_rms
from oracles import decode, matrix_flops, randomize, state_bytes
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import GLA, GLAConfig, Sequence

WIDTH, HEAD_DIM, T = 48, 16, 75
HEADS = WIDTH // HEAD_DIM


def in_our_form(
    theirs: nn.Module, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """Their parameters, or what `value` gives of each, under our names."""
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.g_proj)
    down_proj, up_proj = theirs.gk_proj
    return {
        "in_proj.weight": torch.cat([value(projection.weight) for projection in projections]),
        "decay_down_proj.weight": value(down_proj.weight),
        "decay_up_proj.weight": value(up_proj.weight),
        "decay_up_proj.bias": value(up_proj.bias),
        "o_norm.weight": value(theirs.g_norm_swish_gate.weight),
        "o_proj.weight": value(theirs.o_proj.weight),
    }


@pytest.fixture
def pair() -> tuple[GLA, nn.Module]:
    """Our operator and fla's layer, with the same weights."""
    theirs = GatedLinearAttention(hidden_size=WIDTH, num_heads=HEADS)
    randomize(theirs)
    ours = GLA(GLAConfig(head_dim=HEAD_DIM), WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def layer_of_parts(layer: nn.Module, x: Tensor) -> Tensor:
    """What fla's layer computes, with its torch references in place of its Triton kernels."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (layer.num_heads, -1))

    q, k, v, gate = (
        heads(projection(x))
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj)
    )
    gk = F.logsigmoid(heads(layer.gk_proj(x))) / layer.gate_logit_normalizer
    o, _ = naive_recurrent_gla(q, k, v, gk)
    norm = layer.g_norm_swish_gate
    o = rms_norm_ref(o, norm.weight, None, z=gate, eps=norm.eps, norm_before_gate=True)
    return layer.o_proj(o.flatten(-2))


def test_rows_equal_fla(pair: tuple[GLA, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), layer_of_parts(theirs, x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, lambda parameter: parameter.grad).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_fla(pair: tuple[GLA, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    assert relative_rms(decode(ours, x), layer_of_parts(theirs, x)) < 1e-6


def test_initial_values() -> None:
    """Normal(0, 0.02) and no bias, as in fla's models, so that decays begin at 2 ** (−1 / 16)."""
    model = LanguageModel(Architecture.parse("width=512 vocab_size=8 | gla"))
    ours = model.layers[0].operator
    assert ours.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not ours.decay_up_proj.bias.any()
    *_, g = ours._project(torch.randn(1, 64, 512))
    assert g.exp().mean().item() == pytest.approx(2 ** (-1 / 16), abs=1e-3)


@pytest.mark.parametrize("config", [GLAConfig(8), GLAConfig(16, 1.0, 1.5)], ids=str)
def test_cost_is_exact(config: GLAConfig) -> None:
    operator = GLA(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The decay of each value of the state is one operation, its write and its read two each.
    state = operator.init_state(1, 1).matrix
    assert config.flops_per_token(WIDTH, 9) == matrix_flops(operator) + 5 * state.numel()


def test_parameters_equal_fla() -> None:
    theirs = GatedLinearAttention(hidden_size=WIDTH, num_heads=HEADS)
    config = GLAConfig(head_dim=HEAD_DIM)
    assert config.parameters(WIDTH) == sum(p.numel() for p in theirs.parameters())


def test_problems() -> None:
    assert GLAConfig(16).problems(WIDTH) == []
    assert GLAConfig(20).problems(WIDTH) == ["gla.head_dim: must divide the width 48, got 20"]
    assert GLAConfig(16, 0.0, 1.3).problems(WIDTH) == [
        "gla.expand_k: must make head_dim 16 a whole size > 0, got 0.0",
        "gla.expand_v: must make head_dim 16 a whole size > 0, got 1.3",
    ]
