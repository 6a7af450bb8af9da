"""One model, four ways to compute it: whole rows, packed documents, prefill and steps."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slm.architecture import Architecture
from slm.model import LanguageModel

OPERATORS = {
    "attention": "attention(head_dim=16,query_groups=2,qk_norm=True)",
    "window": "attention(head_dim=16,window=7)",
    "pinned": "attention(head_dim=16,window=7,pinned_tokens=5,rope_ntk=4.0)",
    "pinned_text": "attention(head_dim=16,window=7,pinned_tokens=9)",
    "mamba": "mamba(state_size=4)",
    "mamba2": "mamba2(head_dim=16,state_size=8)",
    "linear_attention": "linear_attention(head_dim=16)",
    "linear_attention_elu": "linear_attention(head_dim=16,feature_map='elu')",
    "gla": "gla(head_dim=16)",
    "deltanet": "deltanet(head_dim=16)",
    "gated_deltanet": "gated_deltanet(head_dim=16,expand_v=1.5)",
    "rwkv7": "rwkv7(head_dim=16)",
    "kda": "kda(head_dim=16)",
    "short_convolution": "short_convolution(conv_width=4)",
    "relu2": "attention(head_dim=16) ffn(activation='relu2')",
    "hybrid": "attention(head_dim=16) ffn mamba2(state_size=8) deltanet(head_dim=8) ffn "
    "attention(head_dim=16,window=9)",
}
T = 100


@pytest.fixture(params=[(name, meta) for name in OPERATORS for meta in (0, 5)], ids=str)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    name, meta_tokens = request.param
    # Not 0: there a first query and key are orthogonal but for 5e-5, and norms blow that up.
    torch.manual_seed(1)
    model = LanguageModel(
        Architecture.parse(f"width=32 vocab_size=60 meta_tokens={meta_tokens} | {OPERATORS[name]}")
    )
    enlarge(model)
    return model


@torch.no_grad()
def enlarge(model: LanguageModel) -> None:
    """Make weights large enough for every operator to matter in the logits."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            if not parameter.any():
                parameter.normal_(std=0.02)
            parameter.mul_(6.0)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(60, (2, T), generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def cut_documents(cuts: list[list[int]]) -> Tensor:
    lengths = [torch.tensor(cut).diff() for cut in cuts]
    return torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in lengths])


@pytest.mark.parametrize("prompt", [1, 3, 64, 65])
def test_prefill_and_steps_equal_forward(model: LanguageModel, tokens: Tensor, prompt: int) -> None:
    expected = model(tokens).detach()
    state = model.init_state(batch_size=2, max_tokens=T)
    assert_close(model.prefill(tokens[:, :prompt], state), expected[:, prompt - 1])
    for t in range(prompt, prompt + 20):
        assert_close(model.step(tokens[:, t], state), expected[:, t])


def test_steps_of_one_shape_equal_forward(model: LanguageModel, tokens: Tensor) -> None:
    expected = model(tokens).detach()
    state = model.init_state(batch_size=2, max_tokens=T)
    model.prefill(tokens[:, :4], state)
    steady = state.upto(model.architecture.meta_tokens + 30)
    shapes = set()
    for t in range(4, 30):
        with ShapeLog() as log:
            logits = model.step(tokens[:, t], steady)
        assert_close(logits, expected[:, t])
        shapes.add(tuple(log.shapes))
    assert len(shapes) == 1
    state.reset()
    assert_close(model.prefill(tokens[:, :4], state), expected[:, 3])


class ShapeLog(TorchDispatchMode):
    """The shapes that every operation of torch gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.shapes.append(tuple(result.shape))
        return result


def test_prefill_in_pieces_equals_forward(model: LanguageModel, tokens: Tensor) -> None:
    expected = model(tokens).detach()
    state = model.init_state(batch_size=2, max_tokens=T)
    for begin, end in ((0, 30), (30, 31), (31, 98)):
        assert_close(model.prefill(tokens[:, begin:end], state), expected[:, end - 1])
    assert_close(model.step(tokens[:, 98], state), expected[:, 98])


def test_rows_of_different_lengths(model: LanguageModel, tokens: Tensor) -> None:
    expected = model(tokens).detach()
    lengths = torch.tensor([13, 40])
    padded = model(tokens[:, :40], lengths=lengths).detach()
    assert_close(padded[0, :13], expected[0, :13])
    state = model.init_state(batch_size=2, max_tokens=T)
    rows = torch.arange(2)
    assert_close(model.prefill(tokens[:, :40], state, lengths), expected[rows, lengths - 1])
    for t in range(20):
        logits = model.step(tokens[rows, lengths + t], state)
        assert_close(logits, expected[rows, lengths + t])


def test_reset_returns_to_the_state_after_the_meta_tokens(
    model: LanguageModel, tokens: Tensor
) -> None:
    state = model.init_state(batch_size=2, max_tokens=T)
    first = model.prefill(tokens[:, :20], state)
    model.step(tokens[:, 20], state)
    state.reset()
    torch.testing.assert_close(model.prefill(tokens[:, :20], state), first, rtol=0, atol=0)


def test_reorder_moves_rows(model: LanguageModel, tokens: Tensor) -> None:
    expected = model(tokens).detach()
    state = model.init_state(batch_size=2, max_tokens=T)
    model.prefill(tokens[:, :20], state)
    state.reorder(torch.tensor([1, 1]))
    logits = model.step(tokens[[1, 1], 20], state)
    assert_close(logits, expected[[1, 1], 20])


def test_reorder_swaps_rows_of_different_lengths(model: LanguageModel, tokens: Tensor) -> None:
    expected = model(tokens).detach()
    rows, lengths = torch.arange(2), torch.tensor([3, 40])
    state = model.init_state(batch_size=2, max_tokens=T)
    model.prefill(tokens[:, :40], state, lengths)
    # The short row has yet to fill the window when they are swapped first, not when next.
    for t in range(20):
        if t % 8 == 1:
            state.reorder(torch.tensor([1, 0]))
            rows = rows.flip(0)
        places = lengths[rows] + t
        assert_close(model.step(tokens[rows, places], state), expected[rows, places])


def test_packed_documents_equal_separate_ones(model: LanguageModel, tokens: Tensor) -> None:
    cuts = [[0, 1, 5, 64, 66, T], [0, 70, 75, 78, 99, T]]
    packed = model(tokens, cut_documents(cuts)).detach()
    for row, cut in enumerate(cuts):
        for begin, end in itertools.pairwise(cut):
            alone = model(tokens[row : row + 1, begin:end])[0].detach()
            assert_close(packed[row, begin:end], alone)


def test_documents_are_told_by_where_ids_change(model: LanguageModel, tokens: Tensor) -> None:
    ids = cut_documents([[0, 30, 41, T], [0, 64, 66, T]])
    # The third document has the first one's number again.
    assert torch.equal(model(tokens, ids % 2), model(tokens, ids))


def test_packed_gradients_equal_separate_ones(model: LanguageModel, tokens: Tensor) -> None:
    cuts = [[0, 40, 43, T]]
    weight = torch.randn(1, T, 60)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    packed = gradients((model(tokens[:1], cut_documents(cuts)) * weight).sum())
    separate = gradients(
        sum(
            (model(tokens[:1, begin:end]) * weight[:, begin:end]).sum()
            for begin, end in itertools.pairwise(cuts[0])
        )
    )
    for (name, _), actual, expected in zip(model.named_parameters(), packed, separate, strict=True):
        if expected is None:
            assert actual is None, name
            continue
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error}"


def test_future_tokens_do_not_matter(model: LanguageModel, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % 60
    assert_close(model(changed)[:, :50], model(tokens)[:, :50])
    assert not torch.allclose(model(changed)[:, 50:], model(tokens)[:, 50:])


def test_meta_tokens_are_seen_from_every_document(tokens: Tensor) -> None:
    for text in OPERATORS.values():
        model = LanguageModel(
            Architecture.parse(f"width=32 vocab_size=60 meta_tokens=5 | {text} {text}")
        )
        enlarge(model)
        logits = model(tokens[:, :4])
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.meta_tokens)
        assert (gradient.abs().sum(-1) > 0).all(), text


def test_untied_head_and_normalized_logits(tokens: Tensor) -> None:
    text = "width=32 vocab_size=60 tie_embeddings=False normalize_logits=True | ffn"
    model = LanguageModel(Architecture.parse(text))
    before = model(tokens)
    with torch.no_grad():
        model.head.weight.mul_(torch.rand(60, 1) + 0.5)
    # Dividing by the rows' norms makes their length irrelevant.
    assert_close(model(tokens), before)


def test_attention_equals_transformers_llama(tokens: Tensor) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = Architecture.parse(
        "width=32 vocab_size=60 norm_eps=1e-06 | "
        + "attention(head_dim=16,query_groups=2) ffn(ratio=2.0) " * 2
    )
    ours = LanguageModel(architecture)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
        ours.norm.weight.copy_(theirs.model.norm.weight)
        for i, layer in enumerate(theirs.model.layers):
            mixer, ffn = ours.layers[2 * i], ours.layers[2 * i + 1]
            mixer.norm.weight.copy_(layer.input_layernorm.weight)
            ffn.norm.weight.copy_(layer.post_attention_layernorm.weight)
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            mixer.operator.qkv_proj.weight.copy_(torch.cat(qkv))
            mixer.operator.o_proj.weight.copy_(attention.o_proj.weight)
            ffn.operator.gate_up_proj.weight.copy_(
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            )
            ffn.operator.down_proj.weight.copy_(mlp.down_proj.weight)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
