import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_space import ATTENTION, DELTANET, FFN, MAMBA2, WIDE_FFN, WINDOW, space_config

from search.space import SearchSpace
from slm.config import ConfigError

seeds = st.integers(0, 10**9).map(random.Random)
HYBRID = {
    "seeds": {
        "hybrid": {
            "blocks": {
                "A": {"operators": [ATTENTION, FFN]},
                "B": {"operators": [MAMBA2, FFN]},
            },
            "pattern": "AAB",
            "depth": 3,
        }
    },
    "reference": {"seed": "hybrid", "width": 32},
}


def constrained(constraints: dict[str, object], **changes: object) -> SearchSpace:
    return SearchSpace(space_config(**{**HYBRID, **changes, "constraints": constraints}))


def enumerable(**constraints: object) -> SearchSpace:
    return constrained(
        constraints, ratios=["0:1", "1:1"], ffns_per_mixer=[0, 1], max_blocks=2, max_operators=6
    )


def full_attention(operators: tuple[str, ...]) -> int:
    return operators.count(ATTENTION)


def met_by_hand(operators: tuple[str, ...]) -> dict[str, bool]:
    return {
        "min_full_attention": full_attention(operators) >= 2,
        "required": MAMBA2 in operators,
        "banned": DELTANET not in operators and WINDOW not in operators,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_full_attention", 2), ("required", ["mamba2"]), ("banned", ["deltanet", WINDOW])],
)
def test_constraints_leave_exactly_what_meets_them(name, value):
    everything = {genotype.phenotype() for genotype in enumerable().genotypes()}
    space = enumerable(**{name: value})
    genotypes = list(space.genotypes())
    left = {genotype.phenotype() for genotype in genotypes}
    assert left == {each for each in everything if met_by_hand(each[0])[name]}
    assert 0 < len(left) < len(everything)
    low, high = space.size_bounds()
    assert low <= len(left) <= high
    assert space.size(len(left)) == len(left)
    for genotype in genotypes:
        assert space.allows(genotype)
        assert all(neighbour.phenotype() in left for neighbour in space.neighbours(genotype))
    unconstrained = enumerable()
    for genotype in unconstrained.genotypes():
        architecture = unconstrained.realize(genotype, 32, vocab_size=64)
        assert space.contains(architecture) == met_by_hand(genotype.operators)[name]


@given(seeds)
def test_samples_mutations_and_crossovers_meet_the_constraints(rng):
    space = constrained(
        {"min_full_attention": 2, "required": ["mamba2"], "banned": ["deltanet", WINDOW]}
    )
    first, second = space.sample(rng), space.sample(rng)
    children = [space.mutate(first, rng).genotype, space.crossover(first, second, rng)]
    for genotype in (first, second, *filter(None, children)):
        assert all(met_by_hand(genotype.operators).values())


def test_a_name_stands_for_every_operator_of_it_and_a_spelling_for_one():
    assert constrained({"banned": ["mamba2"]}, **TRANSFORMER).rules.mixers == (
        ATTENTION,
        WINDOW,
        DELTANET,
    )
    # However it is written.
    window = "attention( window=8, head_dim=16 )"
    assert WINDOW not in constrained({"banned": [window]}).rules.mixers
    assert constrained({"banned": [WIDE_FFN]}, ffns=[FFN, WIDE_FFN]).rules.ffns == (FFN,)
    # A windowed attention is attention, but not a full one.
    space = constrained({"required": ["attention"]})
    assert space.decompose((WINDOW, FFN)) is not None
    assert constrained({"min_full_attention": 1}).decompose((WINDOW, FFN)) is None


TRANSFORMER = {
    "seeds": {"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 2}},
    "reference": {"seed": "t", "width": 32},
}


def test_size_problems_say_value_and_limit():
    space = constrained(
        {"max_parameters": 10_000, "max_state_bytes": 20_000, "state_context_tokens": 100},
        meta_tokens=[4],
    )
    genotype = space.seed("hybrid")
    # By hand, at width 32 and vocabulary 64. Two attentions keep keys and values of 32 numbers of
    # four bytes for each of 104 tokens.
    attention_bytes = 2 * (2 * 32 * 4 * 104)
    architecture = space.realize(genotype, 32, vocab_size=64)
    mamba2 = architecture.operators[4]
    state_bytes = attention_bytes + mamba2.state_bytes(32, 104, 4)
    assert space.size_problems(architecture) == [
        f"max_parameters: must be <= 10000, got {architecture.parameters()}",
        f"max_state_bytes: must be <= 20000 at 100 tokens, got {state_bytes}",
    ]
    # What misses them is in the space, but fits at no such width.
    assert space.contains(architecture)


def test_widths_that_are_too_large_do_not_fit():
    free = constrained({})
    genotype = free.seed("hybrid")
    sizes = {width: free.realize(genotype, width, vocab_size=64) for width in (48, 32, 16)}

    def widths(constraints: dict[str, object]) -> list[int]:
        space = constrained(constraints)
        return [a.width for a in space.fitting(genotype, 64, lambda _: True)]

    assert widths({}) == [48, 32, 16]
    assert widths({"max_parameters": sizes[32].parameters()}) == [32, 16]
    assert widths({"max_parameters": sizes[32].parameters() - 1}) == [16]
    state_bytes = sizes[16].state_bytes(context=100)
    assert widths({"max_state_bytes": state_bytes, "state_context_tokens": 100}) == [16]
    assert widths({"max_state_bytes": state_bytes - 1, "state_context_tokens": 100}) == []


def test_sampling_gives_up_and_says_the_constraints():
    # One model in the space, which one draw in 1,440 is: of 3 mixers, 30 numbers of FFNs and 16
    # lengths one each.
    attention = {"blocks": {"A": {"operators": [ATTENTION]}}, "depth": 30}
    space = constrained(
        {"min_full_attention": 30, "banned": ["deltanet"]},
        ratios=["0:1"],
        max_block_types=1,
        max_blocks=60,
        max_operators=30,
        ffns_per_mixer=list(range(30)),
        seeds={"attention": attention},
        reference={"seed": "attention", "width": 16},
    )
    genotype = space.sample(random.Random(0))
    assert genotype.operators == (ATTENTION,) * 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.space.SAMPLE_ATTEMPTS", 3)
        with pytest.raises(ValueError, match=r"min_full_attention=30, banned=\[deltanet\]"):
            space.sample(random.Random(0))


@pytest.mark.parametrize(
    ("constraints", "messages"),
    [
        (
            {"max_state_bytes": 9},
            ["state_context_tokens: must be given with max_state_bytes, got null"],
        ),
        (
            {"state_context_tokens": 9},
            ["max_state_bytes: must be given with state_context_tokens, got null"],
        ),
        ({"max_parameters": 0}, ["max_parameters: "]),
        (
            {"required": ["mamba"], "banned": ["gru"]},
            [
                "required: 'mamba' is not among mixers and ffns",
                "banned: operator 'gru' is unknown",
            ],
        ),
        (
            {"banned": ["attention", "mamba2", "deltanet", "ffn"]},
            [
                "banned: leaves none of mixers, got ['attention',",
                "banned: leaves none of ffns, got",
            ],
        ),
        ({"required": ["deltanet"], "banned": ["deltanet"]}, ["required: 'deltanet' is banned"]),
        (
            {"min_full_attention": 2, "banned": [ATTENTION]},
            ["min_full_attention: no mixer is attention without a window, got 2"],
        ),
        ({"min_full_attention": 13}, ["min_full_attention: must be <= max_operators 12, got 13"]),
    ],
)
def test_problems_name_field_and_value(constraints, messages):
    with pytest.raises(ConfigError) as error:
        constrained(constraints)
    assert len(error.value.problems) == len(messages)
    for problem, message in zip(error.value.problems, messages, strict=True):
        assert problem.startswith(f"space.constraints.{message}")


def test_a_seed_that_misses_a_constraint_is_named():
    with pytest.raises(ConfigError) as error:
        constrained({"min_full_attention": 3, "required": ["deltanet"]})
    assert error.value.problems == [
        "space.seeds.hybrid: is not in the space: constraints.min_full_attention: must be >= 3, "
        "got 2; constraints.required: 'deltanet' is missing"
    ]
