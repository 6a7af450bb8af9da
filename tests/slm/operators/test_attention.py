"""Attention against that of transformers' Qwen3, Mistral and Llama."""

import pytest
import torch
from numerics import relative_rms
from oracles import decode, matrix_flops, randomize
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen3Config,
    Qwen3Model,
)

from slm.operators import Attention, AttentionConfig, Sequence, parse_operator

WIDTH, HEAD_DIM, T = 64, 16, 75
SIZES = {
    "vocab_size": 8,
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": WIDTH // HEAD_DIM,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
}
WINDOW = 7
# With this factor theirs scales as Nemotron-Flash does, by the length of the row.
NTK = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

CONFIGS = {
    "qk_norm": AttentionConfig(HEAD_DIM, 2, qk_norm=True),
    "window": AttentionConfig(HEAD_DIM, 2, window=WINDOW),
    "rope_ntk": AttentionConfig(HEAD_DIM, 2, rope_ntk=3.0),
}


def build_theirs(name: str) -> nn.Module:
    """A model of one layer, whose attention is the one to compare with."""
    if name == "qk_norm":
        model = Qwen3Model(Qwen3Config(**SIZES))
    elif name == "window":
        model = MistralModel(MistralConfig(**SIZES, sliding_window=WINDOW))
    else:
        config = LlamaConfig(**SIZES, max_position_embeddings=T // 3, rope_parameters=NTK)
        model = LlamaModel(config)
    model.layers[0].input_layernorm = nn.Identity()
    return model


def attend(model: nn.Module, x: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """What the attention of `model` makes of x [B, T, D]; masks and rotations are the model's."""
    outputs: list[Tensor] = []
    hook = model.layers[0].self_attn.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0])
    )
    model(inputs_embeds=x, past_key_values=cache, use_cache=cache is not None)
    hook.remove()
    return outputs[0]


def in_our_form(theirs: nn.Module, use_gradient: bool = False) -> dict[str, Tensor]:
    """Parameters of their attention, or the gradients of these, under our names."""
    found = {
        name: parameter.grad if use_gradient else parameter.detach()
        for name, parameter in theirs.layers[0].self_attn.named_parameters()
    }
    qkv = [found.pop(f"{name}_proj.weight") for name in "qkv"]
    return {"qkv_proj.weight": torch.cat(qkv), **found}


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Attention, nn.Module]:
    """Our operator and a model of theirs, with the same weights."""
    theirs = build_theirs(request.param)
    randomize(theirs)
    ours = Attention(CONFIGS[request.param], WIDTH)
    ours.load_state_dict(in_our_form(theirs))
    return ours, theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, WIDTH)


def test_rows_equal_transformers(pair: tuple[Attention, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    actual, expected = ours(x, Sequence()), attend(theirs, x)
    assert relative_rms(actual, expected) < 2e-6
    weight = torch.randn_like(x)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, gradient in in_our_form(theirs, use_gradient=True).items():
        assert relative_rms(ours.get_parameter(name).grad, gradient) < 1e-5, name


@torch.no_grad()
def test_steps_equal_transformers(pair: tuple[Attention, nn.Module], x: Tensor) -> None:
    ours, theirs = pair
    if ours.config.rope_ntk > 1.0:
        # Theirs changes the rotation while the row grows, and leaves the keys it has as they are.
        expected = attend(theirs, x)
    else:
        cache = DynamicCache(config=theirs.config)
        expected = torch.cat([attend(theirs, token, cache) for token in x.split(1, dim=1)], dim=1)
    assert relative_rms(decode(ours, x), expected) < 2e-6


@pytest.mark.parametrize(
    "text",
    [
        "attention(head_dim=16,window=7)",
        "attention(head_dim=16,window=7,pinned_tokens=5)",
        "attention(head_dim=16,window=150,pinned_tokens=5)",
        "attention(head_dim=16,query_groups=2,rope_ntk=4.0)",
    ],
)
@torch.no_grad()
def test_pieces_and_steps_equal_whole_rows(text: str) -> None:
    """Also where the rows' lengths differ, and long enough for several blocks of queries."""
    operator = Attention(parse_operator(text), WIDTH)
    randomize(operator)
    long = torch.randn(2, 420, WIDTH)
    expected, lengths = operator(long, Sequence()), torch.tensor([3, 40])

    assert relative_rms(decode(operator, long), expected) < 2e-6
    state = operator.init_state(2, 420)
    pieces = [operator(piece, Sequence(), state) for piece in long.split([2, 130, 1, 287], dim=1)]
    assert relative_rms(torch.cat(pieces, dim=1), expected) < 2e-6

    state = operator.init_state(2, 420)
    operator(long[:, :40], Sequence(lengths=lengths), state)
    rows = torch.arange(2)
    for count in range(10):
        y = operator.step(long[rows, lengths + count], state)
        assert relative_rms(y, expected[rows, lengths + count]) < 2e-6
    place = (lengths + 10)[:, None] + torch.arange(300)
    y = operator(long[rows[:, None], place], Sequence(), state)
    assert relative_rms(y, expected[rows[:, None], place]) < 2e-6


@pytest.mark.parametrize(
    ("config", "seen"),
    [
        (AttentionConfig(16), [1, 8, 20, 99]),
        (AttentionConfig(16, 2, qk_norm=True), [1, 8, 20, 99]),
        (AttentionConfig(16, 4, window=8), [1, 8, 8, 8]),
        (AttentionConfig(16, window=8, pinned_tokens=6), [1, 8, 14, 14]),
    ],
    ids=str,
)
def test_cost_is_exact(config: AttentionConfig, seen: list[int]) -> None:
    operator = Attention(config, WIDTH)
    assert config.parameters(WIDTH) == sum(p.numel() for p in operator.parameters())
    for context, num_seen in zip((1, 8, 20, 99), seen, strict=True):
        state = operator.init_state(1, context)
        held = sum(x.numel() * x.element_size() for x in (state.keys, state.values))
        assert config.state_bytes(WIDTH, context, 4) == held
        # Scores and weighted sum: two each per value of a query.
        expected = matrix_flops(operator) + 4 * WIDTH * num_seen
        assert config.flops_per_token(WIDTH, context) == expected


def test_problems() -> None:
    assert AttentionConfig(16, window=8, pinned_tokens=4, rope_ntk=2.0).problems(WIDTH) == []
    assert AttentionConfig(24, pinned_tokens=4, rope_ntk=0.5).problems(WIDTH) == [
        "attention.head_dim: must divide the width 64, got 24",
        "attention.rope_ntk: must be >= 1, and 1 if head_dim is 2, got 0.5 with head_dim 24",
        "attention.pinned_tokens: must be >= 0, and 0 without a window, got 4 with window None",
    ]
    assert AttentionConfig(2).problems(WIDTH) == []
