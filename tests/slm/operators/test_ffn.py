"""The feed-forward network against those of transformers' Llama and Nemotron."""

import pytest
import torch
from numerics import relative_rms
from oracles import decode, matrix_flops, randomize
from torch import nn
from transformers import LlamaConfig, NemotronConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nemotron.modeling_nemotron import NemotronMLP

from slm.operators import FFN, FFNConfig, Sequence, parse_operator

WIDTH, HIDDEN, T = 48, 96, 9
SIZES = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_attention_heads": 3}

SWIGLU = FFNConfig(ratio=2.0), LlamaMLP(LlamaConfig(**SIZES))
RELU2 = FFNConfig(ratio=2.0, activation="relu2"), NemotronMLP(NemotronConfig(**SIZES))


@pytest.mark.parametrize(("config", "theirs"), [SWIGLU, RELU2], ids=["swiglu", "relu2"])
def test_output_equals_transformers(config: FFNConfig, theirs: nn.Module) -> None:
    randomize(theirs)
    ours = FFN(config, WIDTH)
    *inner, down = theirs.parameters()
    ours.load_state_dict({"gate_up_proj.weight": torch.cat(inner), "down_proj.weight": down})
    x = torch.randn(2, T, WIDTH)
    expected = theirs(x)
    assert relative_rms(ours(x, Sequence()), expected) < 1e-6
    assert relative_rms(decode(ours, x), expected) < 1e-6
    assert config.parameters(WIDTH) == sum(p.numel() for p in theirs.parameters())
    assert config.flops_per_token(WIDTH, T) == matrix_flops(ours)


def test_text_of_the_default_is_short() -> None:
    assert str(FFNConfig(ratio=2.0)) == "ffn(ratio=2.0)"
    config = FFNConfig(activation="relu2")
    assert str(config) == "ffn(activation='relu2')"
    assert parse_operator(str(config)) == config


def test_problems() -> None:
    assert FFNConfig().problems(WIDTH) == []
    assert FFNConfig(ratio=0.1, activation="relu").problems(WIDTH) == [
        "ffn.ratio: must be >= 0.666667 at width 48, got 0.1",
        "ffn.activation: must be 'swiglu' or 'relu2', got 'relu'",
    ]
