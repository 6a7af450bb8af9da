"""Linear attention against the parts of fla's layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fla.layers import LinearAttention as FLALayer
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from numerics import relative_rms
from oracles import decode, is_alike, matrix_flops, randomize, state_bytes
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import LinearAttention, LinearAttentionConfig, Sequence
from slm.operators.linear_attention import ElementwiseProduct

WIDTH, HEAD_DIM, T = 48, 16, 75
HEADS = WIDTH // HEAD_DIM


def in_our_form(
    theirs: nn.Module, value: Callable[[nn.Parameter], Tensor] = nn.Parameter.detach
) -> dict[str, Tensor]:
    """Their parameters, or what `value` gives of each, under our names."""
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    tensors = {
        "qkv_proj.weight": torch.cat([value(projection.weight) for projection in projections]),
        "o_norm.weight": value(theirs.norm.weight),
        "o_proj.weight": value(theirs.o_proj.weight),
    }
    if isinstance(theirs.feature_map_q, nn.Module):
        maps = (theirs.feature_map_q, theirs.feature_map_k)
        for name in ("weight", "bias"):
            parts = [(getattr(m.layer1, name), getattr(m.layer2, name)) for m in maps]
            tensors[f"features.{name}"] = torch.cat(
                [value(part) for left_and_right in parts for part in left_and_right]
            )
    return tensors


@pytest.fixture(params=["elementwise_product", "elu"])
def pair(request: pytest.FixtureRequest) -> tuple[LinearAttention, nn.Module]:
    """Our operator and fla's layer, with the same weights."""
    theirs = FLALayer(hidden_size=WIDTH, num_heads=HEADS, feature_map=request.param)
    randomize(theirs)
    ours = LinearAttention(LinearAttentionConfig(HEAD_DIM, request.param), WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def layer_of_parts(layer: nn.Module, x: Tensor) -> Tensor:
    """What fla's layer computes, with its torch reference in place of its Triton kernels."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (layer.num_heads, -1))

    q, k, v = (heads(p(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    o, _ = naive_recurrent_linear_attn(layer.feature_map_q(q), layer.feature_map_k(k), v)
    o = F.rms_norm(o, (layer.head_v_dim,), layer.norm.weight, layer.norm.eps)
    return layer.o_proj(o.flatten(-2))


def test_rows_equal_fla(pair: tuple[LinearAttention, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), layer_of_parts(theirs, x)
    assert relative_rms(actual, expected) < 1e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, lambda parameter: parameter.grad).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_fla(pair: tuple[LinearAttention, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    assert relative_rms(decode(ours, x), layer_of_parts(theirs, x)) < 1e-6


def test_initial_values_are_those_of_fla() -> None:
    """Also inside a model, whose projections are normal(0, 0.02)."""
    model = LanguageModel(Architecture.parse("width=512 vocab_size=8 | linear_attention"))
    ours, theirs = model.layers[0].operator, in_our_form(FLALayer(hidden_size=512))
    assert isinstance(ours.features, ElementwiseProduct)
    assert is_alike(ours.features.weight, theirs["features.weight"])
    assert is_alike(ours.features.bias, theirs["features.bias"])
    assert ours.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    "config", [LinearAttentionConfig(8), LinearAttentionConfig(16, "elu")], ids=str
)
def test_cost_is_exact(config: LinearAttentionConfig) -> None:
    operator = LinearAttention(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    assert config.state_bytes(WIDTH, 9, 4) == state_bytes(operator)
    # The write of each value of the state and its read are two operations each; every head passes
    # the maps.
    state = operator.init_state(1, 1).matrix
    expected = matrix_flops(operator) + 4 * state.numel()
    if isinstance(operator.features, ElementwiseProduct):
        expected += 2 * operator.num_heads * operator.features.weight.numel()
    assert config.flops_per_token(WIDTH, 9) == expected


def test_parameters_equal_fla(pair: tuple[LinearAttention, nn.Module]) -> None:
    ours, theirs = pair
    assert ours.config.parameters(WIDTH) == sum(p.numel() for p in theirs.parameters())


def test_problems() -> None:
    assert LinearAttentionConfig(16).problems(WIDTH) == []
    assert LinearAttentionConfig(20, "relu").problems(WIDTH) == [
        "linear_attention.head_dim: must divide the width 48, got 20",
        "linear_attention.feature_map: must be 'elementwise_product' or 'elu', got 'relu'",
    ]
