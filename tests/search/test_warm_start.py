"""A child begins with its parent's weights, and computes what the parent does."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import relative_rms
from torch import Tensor

from search.warm_start import Inheritance, align, inherit
from slm import weight_norm
from slm.architecture import Architecture
from slm.config import read
from slm.model import LanguageModel
from slm.operators import OPERATORS, OperatorConfig, parse_operator
from slm.training.config import OptimizerConfig
from slm.training.optimizer import build_optimizer

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = yaml.safe_load((CONFIGS / "space" / "all_operators.yaml").read_text())
KINDS = [*SPACE["mixers"], "ffn(ratio=2.0)"]
HYBRID = "attention(head_dim=32) ffn(ratio=2.0) deltanet(head_dim=32) ffn(ratio=2.0)"
VOCABULARY = 50


def architecture(operators: str, width: int = 64, **fields: object) -> Architecture:
    return Architecture(
        width=width,
        vocab_size=VOCABULARY,
        operators=tuple(parse_operator(text) for text in operators.split()),
        **{"meta_tokens": 3, **fields},
    )


@torch.no_grad()
def trained(parent: Architecture, is_normalized: bool = False) -> LanguageModel:
    """A model whose every operator and norm matters in the logits, as after training."""
    torch.manual_seed(1)
    model = LanguageModel(parent)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            if not parameter.any():
                parameter.normal_(std=0.02)
            parameter.mul_(6.0)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    if is_normalized:
        weight_norm.project(model)
    return model


def descend(parent: LanguageModel, child: Architecture) -> tuple[LanguageModel, Inheritance]:
    torch.manual_seed(2)
    model = LanguageModel(child)
    return model, inherit(model, parent.architecture, parent.state_dict())


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def error(tokens: Tensor) -> Callable[[LanguageModel, LanguageModel], float]:
    """Relative error of a child's logits, its parent's being expected."""

    @torch.no_grad()
    def measure(child: LanguageModel, parent: LanguageModel) -> float:
        return relative_rms(child(tokens), parent(tokens))

    return measure


@torch.no_grad()
def without(model: LanguageModel, place: int) -> LanguageModel:
    """The model with an operator that writes nothing."""
    operator = model.layers[place].operator
    for name in operator.writes:
        operator.get_parameter(name).zero_()
    return model


def inserted(parent: Architecture, operator: str, place: int) -> Architecture:
    operators = parent.operators
    new = parse_operator(operator)
    return replace(parent, operators=(*operators[:place], new, *operators[place:]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_architecture_is_the_same_model(kind: str, tokens: Tensor) -> None:
    parent = trained(architecture(f"{kind} ffn {kind}", tie_embeddings=False))
    child, inheritance = descend(parent, parent.architecture)
    assert torch.equal(child(tokens), parent(tokens))
    assert inheritance == Inheritance((0, 1, 2), (0, 1, 2), (), (), 1.0)


@pytest.mark.parametrize("is_normalized", [False, True], ids=["plain", "weight_norm"])
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_operator_changes_nothing(
    kind: str, place: int, is_normalized: bool, error: Callable[..., float]
) -> None:
    parent = trained(architecture(HYBRID), is_normalized)
    child, inheritance = descend(parent, inserted(parent.architecture, kind, place))
    if is_normalized:
        weight_norm.project(child)
    assert error(child, parent) < 2e-6
    assert [len(inheritance.taken), len(inheritance.changed), len(inheritance.new)] == [4, 0, 1]
    # Of its size: it learns as a fresh one does, and weight normalization does not enlarge it.
    (place,) = inheritance.new
    operator = child.layers[place].operator
    for name in operator.writes:
        assert operator.get_parameter(name).abs().mean() > 0.01


def optimizer_step(model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    logits = model(tokens[:, :-1]).flatten(0, 1)
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_weight_norm_does_not_blow_a_new_operator_up(
    kind: str, tokens: Tensor, error: Callable[..., float]
) -> None:
    parent = trained(architecture(HYBRID), is_normalized=True)
    before = trained(architecture(HYBRID), is_normalized=True)
    child, inheritance = descend(parent, inserted(parent.architecture, kind, 2))
    for model in (parent, child):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        weight_norm.attach(optimizer, model)
        optimizer_step(model, optimizer, tokens)
    assert error(child, before) < 1.5 * error(parent, before)
    # And by its second step all of it learns.
    optimizer_step(child, optimizer, tokens)
    (place,) = inheritance.new
    for name, parameter in child.layers[place].named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name


@pytest.mark.parametrize("place", range(4))
def test_without_an_operator_the_rest_stays(place: int, tokens: Tensor) -> None:
    parent = trained(architecture(HYBRID))
    operators = parent.architecture.operators
    rest = operators[:place] + operators[place + 1 :]
    child, inheritance = descend(parent, replace(parent.architecture, operators=rest))
    expected = without(parent, inheritance_gap(inheritance, 4))(tokens)
    torch.testing.assert_close(child(tokens), expected)
    assert inheritance.share == 1.0


def inheritance_gap(inheritance: Inheritance, num_operators: int) -> int:
    """The parent's operator that the child has not."""
    (gap,) = set(range(num_operators)) - set(inheritance.sources)
    return gap


@pytest.mark.parametrize(("old", "new"), list(itertools.pairwise([*KINDS, KINDS[0]])))
def test_another_kind_in_its_place_is_silent_or_the_same_kind_goes_on(
    old: str, new: str, tokens: Tensor
) -> None:
    parent = trained(architecture(f"ffn {old} ffn"))
    child, inheritance = descend(parent, architecture(f"ffn {new} ffn"))
    assert inheritance.sources[::2] == (0, 2)
    if parse_operator(old).name == parse_operator(new).name:
        # Both attention, one of them with a window, which is longer than the text.
        assert inheritance.changed == (1,)
        expected = parent(tokens)
    else:
        assert inheritance.new == (1,)
        expected = without(parent, 1)(tokens)
    torch.testing.assert_close(child(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("width", [96, 160])
@pytest.mark.parametrize("kind", KINDS)
def test_more_width_changes_nothing(
    kind: str, width: int, is_tied: bool, error: Callable[..., float]
) -> None:
    """But for the epsilon of norms, to which zeros beside the channels make the rest smaller."""
    fields = {"norm_eps": 1e-12, "tie_embeddings": is_tied, "normalize_logits": True}
    parent = trained(architecture(f"{kind} ffn {kind}", **fields))
    child, inheritance = descend(parent, replace(parent.architecture, width=width))
    # Mamba2 has a norm over its channels, of the usual epsilon, within it.
    assert error(child, parent) < (1e-3 if "mamba2" in kind else 1e-5)
    assert inheritance.taken == (0, 1, 2)
    num_values = sum(parameter.numel() for parameter in parent.parameters())
    assert inheritance.share * child.architecture.parameters() == pytest.approx(num_values)


@pytest.mark.parametrize("kind", KINDS)
def test_more_width_under_weight_norm_and_the_usual_epsilon(
    kind: str, tokens: Tensor, error: Callable[..., float]
) -> None:
    hybrid = architecture(f"attention(head_dim=32) {kind} ffn")
    parent = trained(hybrid, is_normalized=True)
    before = trained(hybrid, is_normalized=True)
    child, _ = descend(parent, replace(parent.architecture, width=96))
    weight_norm.project(child)
    assert error(child, parent) < 0.01
    for model in (parent, child):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        weight_norm.attach(optimizer, model)
        optimizer_step(model, optimizer, tokens)
    assert error(child, before) < 2.0 * error(parent, before)
    # What is new comes alive: the stream's channels at once, and then all that reads them.
    for _ in range(2):
        optimizer_step(child, optimizer, tokens)
    for name, parameter in child.named_parameters():
        assert parameter.grad is not None
        if parameter.shape[-1] == 96:
            assert parameter.grad[..., 64:].reshape(-1, 32).any(dim=0).all(), name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ffn(ratio=1.0)", "ffn(ratio=2.5)"),
        ("ffn(ratio=1.0,activation='relu2')", "ffn(ratio=2.0,activation='relu2')"),
        ("mamba(expand=1)", "mamba(expand=2)"),
        ("short_convolution(conv_width=2)", "short_convolution(conv_width=4)"),
        ("deltanet(head_dim=32,conv_width=2)", "deltanet(head_dim=32,conv_width=5)"),
        ("attention(head_dim=32)", "attention(head_dim=32,window=64)"),
    ],
)
@pytest.mark.parametrize("is_normalized", [False, True], ids=["plain", "weight_norm"])
def test_an_operator_grows_in_silence(
    old: str, new: str, is_normalized: bool, error: Callable[..., float]
) -> None:
    parent = trained(architecture(f"ffn {old}"), is_normalized)
    child, inheritance = descend(parent, architecture(f"ffn {new}"))
    if is_normalized:
        weight_norm.project(child)
    assert error(child, parent) < 2e-6
    assert inheritance.changed == (1,)


def test_each_part_of_a_fused_projection_is_cut_by_itself() -> None:
    parent = trained(architecture("mamba2(head_dim=32,state_size=32)"))
    child, _ = descend(parent, architecture("mamba2(head_dim=32,state_size=16)", width=32))
    known = parent.layers[0].operator.in_proj.weight
    # Gate and values of twice the width, keys, queries, and a step size for each head.
    first, kept = (0, 128, 256, 288, 320), (64, 64, 16, 16, 2)
    rows = [row for a, n in zip(first, kept, strict=True) for row in range(a, a + n)]
    assert torch.equal(child.layers[0].operator.in_proj.weight, known[rows, :32])
    # Gate and up of a feed-forward network.
    parent, text = trained(architecture("ffn(ratio=2.0)")), "ffn(ratio=1.0)"
    child, _ = descend(parent, architecture(text))
    known = parent.layers[0].operator.gate_up_proj.weight
    assert torch.equal(
        child.layers[0].operator.gate_up_proj.weight, torch.cat([known[:64], known[128:192]])
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_know_their_parts(name: str) -> None:
    config = OPERATORS[name].config_class()
    operator = OPERATORS[name](config, 128)
    parts = config.parts(128)
    for tensor, sizes in parts.items():
        assert sum(sizes.values()) == len(operator.get_parameter(tensor)), tensor
    named = {part for sizes in parts.values() for part in sizes}
    named |= {tensor for tensor, _ in operator.named_parameters() if tensor not in parts}
    assert set(operator.value_parts) <= named


def test_meta_tokens_are_taken_where_both_have_them(tokens: Tensor) -> None:
    parent = trained(architecture(HYBRID, meta_tokens=4))
    for count in (0, 2, 6):
        child, _ = descend(parent, architecture(HYBRID, meta_tokens=count))
        kept = min(count, 4)
        assert torch.equal(child.meta_tokens[:kept], parent.meta_tokens[:kept])
        assert child(tokens).isfinite().all()


def test_the_head_of_a_tied_parent_is_its_embedding(error: Callable[..., float]) -> None:
    parent = trained(architecture(HYBRID))
    child, inheritance = descend(parent, architecture(HYBRID, tie_embeddings=False))
    assert error(child, parent) == 0.0
    assert inheritance.share == 1.0


def test_weights_of_another_model_are_refused() -> None:
    weights = LanguageModel(architecture(HYBRID, width=32)).state_dict()
    model = LanguageModel(architecture(HYBRID))
    with pytest.raises(
        ValueError, match=r"embedding is \[50, 32\], of the parent it is \[50, 64\]"
    ):
        inherit(model, model.architecture, weights)


OPERATOR_TEXTS = st.lists(
    st.sampled_from(
        [
            *KINDS,
            "ffn(ratio=3.0)",
            "ffn(activation='relu2')",
            "attention(head_dim=16,query_groups=2,qk_norm=True)",
            "mamba2(head_dim=16,state_size=8,expand=1)",
            "gated_deltanet(head_dim=16,expand_v=1.0,conv_width=3)",
            "gla(head_dim=32,expand_k=1.0)",
            "linear_attention(head_dim=16,feature_map='elu')",
        ]
    ),
    min_size=1,
    max_size=5,
)
ARCHITECTURES = st.builds(
    lambda texts, width, **fields: architecture(" ".join(texts), width, **fields),
    OPERATOR_TEXTS,
    st.sampled_from([32, 64, 96]),
    meta_tokens=st.sampled_from([0, 2, 3]),
    tie_embeddings=st.booleans(),
    normalize_logits=st.booleans(),
)


@settings(max_examples=40)
@given(ARCHITECTURES, ARCHITECTURES)
def test_any_child_of_any_parent(parent: Architecture, child: Architecture) -> None:
    known = trained(parent)
    before = {name: weight.clone() for name, weight in known.state_dict().items()}
    model, inheritance = descend(known, child)
    again, _ = descend(known, child)
    assert all(torch.equal(before[name], weight) for name, weight in known.state_dict().items())
    for weight, same in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, same)
    with torch.no_grad():
        assert model(torch.arange(12).unsqueeze(0)).isfinite().all()
    assert 0.0 < inheritance.share <= 1.0
    numbers = [*inheritance.taken, *inheritance.changed, *inheritance.new]
    assert sorted(numbers) == list(range(len(child.operators)))


def configs(max_size: int) -> st.SearchStrategy[list[OperatorConfig]]:
    texts = ["ffn", "ffn(ratio=2.0)", "attention", "deltanet"]
    return st.lists(st.sampled_from(list(map(parse_operator, texts))), max_size=max_size)


@given(configs(5), configs(5))
def test_alignment_is_the_best_of_all(
    parent: list[OperatorConfig], child: list[OperatorConfig]
) -> None:
    def quality(pairs: list[tuple[int, int]]) -> tuple[int, int, float]:
        """How many are equal, how many are of a kind, and how little their depths differ."""
        num_equal = sum(parent[i] == child[j] for i, j in pairs)
        depths = [abs((i + 0.5) / len(parent) - (j + 0.5) / len(child)) for i, j in pairs]
        return num_equal, len(pairs), -round(sum(depths), 9)

    possible = [
        pairs
        for count in range(min(len(parent), len(child)) + 1)
        for ours in itertools.combinations(range(len(parent)), count)
        for theirs in itertools.combinations(range(len(child)), count)
        for pairs in [list(zip(ours, theirs, strict=True))]
        if all(parent[i].name == child[j].name for i, j in pairs)
    ]
    sources = align(parent, child)
    found = [(i, j) for j, i in enumerate(sources) if i is not None]
    assert len(sources) == len(child)
    assert found in possible
    assert quality(found) == max(map(quality, possible))


def test_of_equals_the_one_at_the_same_depth_is_taken() -> None:
    ffn = parse_operator("ffn")
    assert align([ffn] * 3, [ffn]) == (1,)
    assert align([ffn], [ffn] * 3) == (None, 0, None)


def text_rows() -> Tensor:
    """[64, 33] characters of words drawn at random."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(20)]
    text = " ".join(rng.choices(words, k=500))
    characters = sorted(set(text))
    return torch.tensor([characters.index(c) for c in text[: 64 * 33]]).view(64, 33)


def train(model: LanguageModel, config: OptimizerConfig, num_steps: int) -> float:
    """The loss on the last rows after training on the others, four rows a step."""
    optimizer, scheduler = build_optimizer(model, config, num_steps, tokens_per_step=1)
    rows = text_rows()
    for step in range(num_steps):
        optimizer_step(model, optimizer, rows[:56].roll(-4 * step, 0)[:4])
        scheduler.step()
    with torch.no_grad():
        logits = model(rows[56:, :-1]).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, rows[56:, 1:].flatten()).item()


@pytest.mark.parametrize("name", ["adamw", "adam_weight_norm"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda parent: inserted(parent, "gla(head_dim=32)", 1), id="new"),
        pytest.param(lambda parent: replace(parent, width=96), id="wider"),
        pytest.param(lambda parent: replace(parent, operators=parent.operators[:3]), id="shorter"),
    ],
)
def test_a_warm_child_is_ahead_of_a_fresh_one(
    change: Callable[[Architecture], Architecture], name: str
) -> None:
    values = yaml.safe_load((CONFIGS / "optimizer" / f"{name}.yaml").read_text())
    config = read(OptimizerConfig, {**values, "lr": 2e-3, "warmup_steps": 0}, "optimizer")
    torch.manual_seed(1)
    parent = LanguageModel(architecture(HYBRID))
    train(parent, config, 60)
    child = change(parent.architecture)
    losses = {}
    for is_warm in (True, False):
        torch.manual_seed(2)
        model = LanguageModel(child)
        if is_warm:
            inherit(model, parent.architecture, parent.state_dict())
        losses[is_warm] = train(model, config, 20)
    assert losses[True] < losses[False] - 0.2
