import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import (
    AttentionConfig,
    DeltaNetConfig,
    FFNConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    KDAConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MambaConfig,
    OperatorConfig,
    RWKV7Config,
    ShortConvolutionConfig,
    parse_operator,
)

operators = st.one_of(
    st.builds(
        AttentionConfig,
        head_dim=st.sampled_from([4, 16]),
        query_groups=st.sampled_from([1, 2]),
        window=st.none() | st.integers(1, 600),
        qk_norm=st.booleans(),
        rope_theta=st.sampled_from([1e4, 5e5]),
        rope_ntk=st.sampled_from([1.0, 2.0]),
    ),
    st.builds(
        AttentionConfig,
        head_dim=st.just(16),
        window=st.integers(1, 600),
        pinned_tokens=st.integers(0, 5),
    ),
    st.builds(
        Mamba2Config,
        expand=st.sampled_from([1, 2]),
        head_dim=st.sampled_from([8, 16]),
        state_size=st.sampled_from([4, 16]),
    ),
    st.builds(DeltaNetConfig, head_dim=st.sampled_from([8, 16]), conv_width=st.integers(2, 5)),
    st.builds(
        GatedDeltaNetConfig,
        head_dim=st.sampled_from([8, 16]),
        expand_v=st.sampled_from([1.0, 2.0]),
    ),
    st.builds(KDAConfig, head_dim=st.sampled_from([8, 16])),
    st.builds(GLAConfig, head_dim=st.sampled_from([8, 16]), expand_k=st.sampled_from([0.5, 1.0])),
    st.builds(
        LinearAttentionConfig,
        head_dim=st.sampled_from([8, 16]),
        feature_map=st.sampled_from(["elementwise_product", "elu"]),
    ),
    st.builds(RWKV7Config, head_dim=st.sampled_from([8, 16])),
    st.builds(MambaConfig, expand=st.sampled_from([1, 2]), state_size=st.sampled_from([4, 16])),
    st.builds(ShortConvolutionConfig, conv_width=st.integers(2, 5)),
    st.builds(
        FFNConfig,
        ratio=st.sampled_from([1.0, 2.5]),
        multiple_of=st.sampled_from([1, 16]),
        activation=st.sampled_from(["swiglu", "relu2"]),
    ),
)
architectures = st.builds(
    Architecture,
    width=st.sampled_from([32, 64]),
    vocab_size=st.integers(1, 50),
    operators=st.lists(operators, min_size=1, max_size=4).map(tuple),
    meta_tokens=st.integers(0, 3),
    tie_embeddings=st.booleans(),
    normalize_logits=st.booleans(),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
)


@given(architectures)
def test_text_round_trips_and_names_one_architecture(architecture: Architecture) -> None:
    again = Architecture.parse(str(architecture))
    assert again == architecture
    assert again.digest == architecture.digest
    wider = dataclasses.replace(architecture, width=2 * architecture.width)
    assert wider.digest != architecture.digest


@given(architectures)
def test_parameters_are_exact(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = LanguageModel(architecture)
    assert architecture.parameters() == sum(p.numel() for p in model.parameters())


@given(architectures)
def test_state_bytes_are_exact(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = LanguageModel(architecture)
    context = 9
    states = [layer.operator.init_state(1, context) for layer in model.layers]
    # Attention's position is bookkeeping, not state.
    held = sum(
        t.numel() * t.element_size() for s in states for t in s.tensors() if t.is_floating_point()
    )
    assert architecture.state_bytes(context) == held


@pytest.mark.parametrize("text", ["attention(head_dim=16,query_groups=2)", "ffn(ratio=2.0)"])
def test_flops_equal_torchs_count_on_a_long_row(text: str) -> None:
    num_tokens = 64
    architecture = Architecture(width=32, vocab_size=50, operators=(parse_operator(text),))
    model = LanguageModel(architecture)
    # Torch counts attention only where it is made of matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, num_tokens, dtype=torch.int64))
    # Dense attention computes every query against every key.
    assert counter.get_total_flops() == architecture.flops_per_token(num_tokens) * num_tokens


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("width=64 vocab_size=10 | attn", "'attn' is unknown"),
        ("width=64 vocab_size=10 | attention(head_dims=3)", "'head_dims'"),
        ("width=64 vocab_size=10 | attention(head_dim=x)", "attention.head_dim"),
        ("width=64 vocab_size=10 | attention(head_dim=48)", "must divide the width 64, got 48"),
        ("width=64 vocab_size=10 | ffn(ratio=0.1)", "ffn.ratio"),
        ("width=64 vocab_size=10 | ffn(activation=gelu)", "ffn.activation: must be 'swiglu' or"),
        ("width=64 vocab_size=ten | ffn", "architecture.vocab_size: cannot read 'ten'"),
        ("width=64 | ffn", "architecture.vocab_size: missing"),
        ("width=64 vocab_size=10 |", "operators: must not be empty"),
        ("width=64 vocab_size=10", "expected"),
    ],
)
def test_errors_name_field_and_value(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + named.replace("(", r"\(")):
        Architecture.parse(text)


def test_all_problems_are_gathered() -> None:
    with pytest.raises(ValueError, match="width") as caught:
        Architecture(width=0, vocab_size=0, operators=(), meta_tokens=-1)
    assert all(name in str(caught.value) for name in ("vocab_size", "operators", "meta_tokens"))


def test_defaults_are_left_out_of_the_text() -> None:
    config: OperatorConfig = AttentionConfig(window=8)
    assert str(config) == "attention(window=8)"
    assert parse_operator("attention( window=8 , head_dim = 64)") == config


def test_words_need_no_quotes() -> None:
    assert parse_operator("ffn(activation=relu2)") == parse_operator("ffn(activation='relu2')")
