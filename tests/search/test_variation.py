import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_space import (
    ATTENTION,
    DELTANET,
    FFN,
    MAMBA2,
    WIDE_FFN,
    WINDOW,
    factors_config,
    space_config,
)

from search.genotype import BlockType, Genotype
from search.space import SearchSpace
from search.variation import every

SPACE = SearchSpace(space_config())
FACTORS = SearchSpace(factors_config())
ONE_BLOCK = {
    "seeds": {"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
    "reference": {"seed": "t", "width": 16},
}
ONE_MIXER = SearchSpace(
    space_config(mixers=[ATTENTION], ratios=["0:1", "1:1"], max_block_types=2, **ONE_BLOCK)
)
# Small enough to go through. In the first, blocks are operators with their FFNs, so that every
# model is spelled in one way only.
UNITS = SearchSpace(
    factors_config(
        mixers=[ATTENTION, MAMBA2, DELTANET],
        ratios=["0:1"],
        ffns_per_mixer=[0, 1],
        max_block_types=2,
        max_blocks=3,
        max_operators=4,
        meta_tokens=[0, 4],
        widths=[16, 32],
        **ONE_BLOCK,
    )
)
PAIRS = SearchSpace(
    space_config(
        mixers=[ATTENTION, MAMBA2],
        ratios=["0:1", "1:1", "1:2"],
        ffns_per_mixer=[0, 1],
        max_block_types=2,
        max_blocks=3,
        max_operators=5,
        **ONE_BLOCK,
    )
)
MODEL_FACTORS = {"ffn", "meta_tokens", "width"}
seeds = st.integers(0, 10**9).map(random.Random)


def test_every_goes_through_all_choices_once():
    def word(choose):
        letters = choose(("", "a", "bc"))
        return letters + (choose(letters) + choose("12") if letters else "")

    assert list(every(word)) == ["", "aa1", "aa2", "bcb1", "bcb2", "bcc1", "bcc2"]
    assert list(every(lambda choose: "nothing to choose")) == ["nothing to choose"]


def changed_fields(old: BlockType, new: BlockType) -> set[str]:
    return {
        name
        for name in ("mixers", "ratio", "ffns_per_mixer")
        if getattr(old, name) != getattr(new, name)
    }


def is_one_change(factor: str, parent: Genotype, child: Genotype) -> bool:
    """Whether the child, as it is spelled, is the parent with this factor changed."""
    changed = {name for name in MODEL_FACTORS if getattr(parent, name) != getattr(child, name)}
    old, new = parent.sequence, child.sequence
    if factor in MODEL_FACTORS:
        return changed == {factor} and old == new
    if changed or old == new:
        return False
    if factor == "count":
        longer, shorter = sorted((old, new), key=len, reverse=True)
        return (
            len(longer) == len(shorter) + 1
            and any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
            and set(longer) == set(old)
        )
    if len(old) != len(new):
        return False
    places = [place for place in range(len(old)) if old[place] != new[place]]
    if factor == "order":
        return len(places) == 2 and sorted(old) == sorted(new)
    # A run of the copies of one type, or all of them, became the same other type.
    before, after = old[places[0]], new[places[0]]
    copies = [place for place, block in enumerate(old) if block == before]
    first = copies.index(places[0])
    if copies[first : first + len(places)] != places or {new[p] for p in places} != {after}:
        return False
    fields = changed_fields(before, after)
    if factor == "operator":
        return (
            fields == {"mixers"}
            and sum(a != b for a, b in zip(before.mixers, after.mixers, strict=True)) == 1
            and len(set(after.mixers) - set(before.mixers)) == 1
        )
    if factor == "ffns_per_mixer":
        return fields == {"ffns_per_mixer"}
    # Between one mixer and two a mixer comes or goes with its share.
    same_number = len(before.mixers) == len(after.mixers)
    kept = set(before.mixers) & set(after.mixers)
    return fields - {"mixers"} == {"ratio"} and (
        before.mixers == after.mixers if same_number else len(kept) == 1
    )


@settings(max_examples=200)
@given(seeds)
def test_mutation_changes_exactly_one_factor(rng):
    for space in (SPACE, ONE_MIXER, FACTORS):
        parent = space.sample(rng)
        mutation = space.mutate(parent, rng)
        assert mutation is not None
        assert space.allows(mutation.genotype)
        assert is_one_change(mutation.factor, parent, mutation.genotype)
        assert space.canonical(mutation.genotype) != parent


def test_every_factor_that_there_is_a_choice_of_is_drawn():
    rng = random.Random(0)
    factors = {"operator", "ratio", "ffns_per_mixer", "count", "order"}
    hybrid = SPACE.seed("hybrid")
    assert {SPACE.mutate(hybrid, rng).factor for _ in range(100)} == factors
    assert set(SPACE.rules.factors) == factors
    hybrid = replace(FACTORS.decompose(hybrid.operators, width=32), meta_tokens=8)
    drawn = {FACTORS.mutate(hybrid, rng).factor for _ in range(200)}
    assert drawn == factors | MODEL_FACTORS
    assert set(ONE_MIXER.rules.factors) == {"ffns_per_mixer", "count", "order"}


@pytest.mark.parametrize("space", [UNITS, PAIRS], ids=["units", "pairs"])
def test_neighbours_are_all_that_mutation_reaches(space):
    genotypes = set(space.genotypes())
    rng = random.Random(0)
    for genotype in sorted(genotypes, key=str):
        neighbours = list(space.neighbours(genotype))
        assert neighbours == list(space.neighbours(genotype))
        assert len(set(neighbours)) == len(neighbours)
        assert genotypes.issuperset(neighbours)
        assert genotype not in neighbours
        for _ in range(20):
            assert space.canonical(space.mutate(genotype, rng).genotype) in neighbours


def test_neighbours_are_those_that_differ_in_one_factor():
    genotypes = list(UNITS.genotypes())
    rng = random.Random(0)
    for parent in rng.sample(genotypes, 40):
        # No other spelling of the same operators than with another FFN that there is none of.
        spellings = {
            replace(child, ffn=ffn): child
            for child in genotypes
            for ffn in (FFN, WIDE_FFN)
            if replace(child, ffn=ffn).operators == child.operators
        }
        expected = {
            child
            for spelling, child in spellings.items()
            if any(is_one_change(factor, parent, spelling) for factor in UNITS.rules.factors)
        } - {parent}
        assert set(UNITS.neighbours(parent)) == expected


@pytest.mark.parametrize("space", [UNITS, PAIRS], ids=["units", "pairs"])
def test_mutations_reach_the_whole_space(space):
    reached, latest = set(), {space.seed("t")}
    while latest:
        reached |= latest
        latest = {n for genotype in latest for n in space.neighbours(genotype)} - reached
    assert reached == set(space.genotypes())


@given(seeds)
def test_mutations_of_a_large_space_are_among_the_neighbours(rng):
    genotype = FACTORS.sample(rng)
    neighbours = set(FACTORS.neighbours(genotype))
    for _ in range(10):
        assert FACTORS.canonical(FACTORS.mutate(genotype, rng).genotype) in neighbours


def test_nothing_to_mutate_is_said():
    alone = {"mixers": [ATTENTION], "ratios": ["0:1"], "max_blocks": 1, **ONE_BLOCK}
    rng = random.Random(0)
    space = SearchSpace(space_config(ffns_per_mixer=[1], **alone))
    assert space.mutate(space.seed("t"), rng) is None
    assert list(space.neighbours(space.seed("t"))) == []
    # A choice that makes no difference: the kind of FFN where there is none.
    space = SearchSpace(
        space_config(
            ffns_per_mixer=[0],
            ffns=[FFN, WIDE_FFN],
            **{**alone, "seeds": {"t": {"blocks": {"A": {"operators": [ATTENTION]}}, "depth": 1}}},
        )
    )
    assert space.rules.factors == ("ffn",)
    assert space.mutate(space.seed("t"), rng) is None


def test_the_one_possible_mutation_among_very_many_is_found():
    # Ten blocks of the only type; every change but one misses a constraint or a limit.
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION, MAMBA2],
            ratios=["0:1"],
            ffns_per_mixer=[0],
            max_blocks=10,
            max_operators=10,
            constraints={"min_full_attention": 9, "required": ["mamba2"]},
            seeds={
                "t": {
                    "blocks": {
                        "A": {"operators": [ATTENTION]},
                        "B": {"operators": [MAMBA2]},
                    },
                    "pattern": "AAAAAAAAAB",
                    "depth": 10,
                }
            },
            reference={"seed": "t", "width": 16},
        )
    )
    mutation = space.mutate(space.seed("t"), random.Random(0))
    assert mutation is not None
    assert mutation.factor == "order"


@given(seeds)
def test_crossover_is_the_beginning_of_one_and_the_end_of_the_other(rng):
    for space in (SPACE, FACTORS):
        first, second = space.sample(rng), space.sample(rng)
        child = space.crossover(first, second, rng)
        if child is None:
            continue
        assert space.allows(child)
        assert space.canonical(child) == child
        assert child.phenotype() not in (first.phenotype(), second.phenotype())
        assert child.meta_tokens in (first.meta_tokens, second.meta_tokens)
        assert child.width in (first.width, second.width)
        # Up to the kind of FFN, of which a model has one.
        mixers, of_first, of_second = (
            [FFN if operator == WIDE_FFN else operator for operator in genotype.operators]
            for genotype in (child, first, second)
        )
        assert any(
            mixers[:cut] == of_first[:cut]
            and mixers[cut:] == of_second[len(of_second) - len(mixers) + cut :]
            for cut in range(1, len(mixers))
            if len(mixers) - cut <= len(of_second)
        )


def test_crossover_of_two_is_almost_always_possible_and_varied():
    rng = random.Random(0)
    drawn = (FACTORS.sample(rng) for _ in range(100))
    # Models of a single block have little to exchange.
    parents = [genotype for genotype in drawn if len(genotype.pattern) > 1][:2]
    children = Counter(FACTORS.crossover(*parents, rng) for _ in range(100))
    assert None not in children
    assert len(children) > 5


def test_crossover_without_a_child_in_the_space_is_said():
    space = SearchSpace(space_config(**{**ONE_BLOCK, "max_blocks": 1}))
    first, second = (
        Genotype.from_sequence([BlockType((mixer,))], FFN) for mixer in (ATTENTION, WINDOW)
    )
    assert space.crossover(first, second, random.Random(0)) is None
