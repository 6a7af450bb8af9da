import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_space import ATTENTION, DELTANET, FFN, MAMBA2, space_config

from search.genotype import BlockType, Genotype
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import ConfigError, compose, read
from slm.model_config import ModelConfig
from slm.operators import parse_operator

SPACE = SearchSpace(space_config())
ONE_MIXER = SearchSpace(
    space_config(
        mixers=[ATTENTION],
        ratios=["0:1", "1:1"],
        max_block_types=2,
        seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
        reference={"seed": "t", "width": 16},
    )
)
seeds = st.integers(0, 10**9).map(random.Random)


def composed_space(name: str) -> SpaceConfig:
    config = compose("search", [f"space={name}", "target_ms=1"])[0]
    return read(SpaceConfig, config.space, "space")


@given(seeds)
def test_samples_are_in_the_space_and_canonical(rng):
    for space in (SPACE, ONE_MIXER):
        genotype = space.sample(rng)
        assert space.allows(genotype)
        assert space.canonical(genotype) == genotype
        for width in space.available_widths(genotype):
            assert space.contains(space.realize(genotype, width, vocab_size=64))


@given(seeds)
def test_canonical_keeps_the_operators_and_is_the_same_for_all_spellings(rng):
    genotype = SPACE.sample(rng)
    # Another spelling of the same operators: every block of one mixer.
    spelling = Genotype.from_sequence(
        [
            BlockType((mixer,), ffns_per_mixer=block.ffns_per_mixer)
            for block in genotype.sequence
            for mixer in block.operators(FFN)
            if mixer != FFN
        ]
    )
    assert spelling.operators(FFN) == genotype.operators(FFN)
    assert SPACE.decompose(spelling.operators(FFN)) == genotype


def changed_fields(old: BlockType, new: BlockType) -> set[str]:
    return {
        name
        for name in ("mixers", "ratio", "ffns_per_mixer")
        if getattr(old, name) != getattr(new, name)
    }


@settings(max_examples=200)
@given(seeds)
def test_mutation_changes_exactly_one_factor(rng):
    for space in (SPACE, ONE_MIXER):
        parent = space.sample(rng)
        mutation = space.mutate(parent, rng)
        assert mutation is not None
        child = mutation.genotype
        assert space.allows(child)
        old, new = parent.sequence, child.sequence
        if mutation.factor == "count":
            longer, shorter = sorted((old, new), key=len, reverse=True)
            assert len(longer) == len(shorter) + 1
            assert any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
            continue
        changes = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        if mutation.factor == "order":
            assert len(changes) == 2
            assert sorted(old) == sorted(new)
            continue
        # Copies of one type all became the same other type.
        assert len(set(changes)) == 1
        before, after = changes[0]
        if mutation.factor == "operator":
            assert changed_fields(before, after) == {"mixers"}
            assert sum(a != b for a, b in zip(before.mixers, after.mixers, strict=True)) == 1
        elif mutation.factor == "ffns_per_mixer":
            assert changed_fields(before, after) == {"ffns_per_mixer"}
        else:
            # Between one mixer and two a mixer comes or goes with its share.
            assert changed_fields(before, after) - {"mixers"} == {"ratio"}
            assert set(before.mixers) & set(after.mixers)


def test_every_factor_is_drawn():
    rng = random.Random(0)
    hybrid = SPACE.seed("hybrid")
    factors = {SPACE.mutate(hybrid, rng).factor for _ in range(100)}
    assert factors == {"operator", "ratio", "ffns_per_mixer", "count", "order"}


def test_nothing_to_mutate_is_said():
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION],
            ratios=["0:1"],
            ffns_per_mixer=[1],
            max_blocks=1,
            seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
            reference={"seed": "t", "width": 16},
        )
    )
    assert space.mutate(space.seed("t"), random.Random(0)) is None


@given(seeds)
def test_json_round_trip(rng):
    genotype = SPACE.sample(rng)
    assert Genotype.from_json(genotype.to_json()) == genotype


def test_blocks_read_as_published():
    block = BlockType((DELTANET, MAMBA2), (1, 2), ffns_per_mixer=1)
    assert block.operators(FFN) == (DELTANET, FFN, MAMBA2, FFN, MAMBA2, FFN)
    with pytest.raises(ValueError, match="2 different mixers"):
        BlockType((MAMBA2, MAMBA2), (1, 1))


def test_short_form_groups_equal_blocks():
    delta, attention = BlockType((DELTANET,)), BlockType((ATTENTION,), ffns_per_mixer=2)
    genotype = Genotype.from_sequence([delta, delta, attention])
    assert SPACE.short_form(genotype) == "2×[D F] [A F F]"
    assert SPACE.legend["attention(head_dim=16,window=8)"] == "W"
    assert SPACE.legend[MAMBA2] == "M2"


def test_an_operator_without_a_short_name_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(type(parse_operator(DELTANET)), "short_name", "")
    assert SearchSpace(space_config()).legend[DELTANET] == "deltanet"


def test_widest_that_meets_the_target():
    genotype = SPACE.seed("hybrid")

    def predict_ms(architecture: Architecture) -> float:
        return architecture.width / 10

    widths = [a.width for a in SPACE.fitting(genotype, 64, predict_ms, target_ms=3.3)]
    assert widths == [32, 16]
    assert SPACE.fitting(genotype, 64, predict_ms, target_ms=1.5) == []


def test_a_width_that_an_operator_cannot_take_is_unavailable():
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION, "deltanet(head_dim=32)"],
            widths=[16, 32],
            seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
            reference={"seed": "t", "width": 16},
        )
    )
    narrow = Genotype.from_sequence([BlockType((ATTENTION,))])
    wide = Genotype.from_sequence([BlockType((ATTENTION, "deltanet(head_dim=32)"), (1, 1))])
    assert space.available_widths(narrow) == [32, 16]
    assert space.available_widths(wide) == [32]
    assert ("deltanet(head_dim=32)", 16) not in {(str(op), w) for op, w in space.operators()}


@pytest.mark.parametrize(
    ("space_name", "model_name"),
    [("nemotron_flash", "nemotron_flash_1b"), ("nemotron_flash_3b", "nemotron_flash_3b")],
)
def test_released_nemotron_flash_models_are_in_the_space(space_name, model_name):
    space = SearchSpace(composed_space(space_name))
    model = compose("train", [f"model={model_name}"])[0].model
    architecture = read(ModelConfig, model).architecture(tokenizer_vocab_size=131072)
    assert space.contains(architecture)
    letters = {"deltanet": "D", "attention": "A", "mamba2": "M2", "ffn": "F"}
    layers = " ".join(letters[operator.name] for operator in architecture.operators)
    flash_1b = "D F M2 F A F M2 F D F M2 F A F M2 F D F M2 F D F M2 F"
    flash_3b = " ".join(["D F M2 F A F M2 F"] * 3 + ["D F M2 F"] * 3)
    assert layers == (flash_1b if model_name.endswith("1b") else flash_3b)


def test_what_is_outside_the_space_is_not_contained():
    inside = SPACE.realize(SPACE.seed("hybrid"), 32, 64)
    assert SPACE.contains(inside)
    text = str(inside)
    for outside in (
        text.replace("width=32", "width=64"),
        text.replace("vocab_size=64", "vocab_size=64 meta_tokens=4"),
        text.replace("head_dim=16", "head_dim=8"),
        text.replace("ffn(ratio=2.0)", "ffn"),
        text + f" {FFN} {FFN}",
        text + f" {FFN}" * 10,
    ):
        assert outside != text
        assert not SPACE.contains(Architecture.parse(outside))


@pytest.mark.parametrize("name", ["demo", "nemotron_flash", "nemotron_flash_3b"])
def test_shipped_spaces_compose(name):
    space = SearchSpace(composed_space(name))
    reference = space.reference(vocab_size=4096)
    assert {operator.name for operator in reference.operators} == {"attention", "ffn"}
    assert all(space.seed(seed) for seed in space.config.seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": [ATTENTION, "gru"]}, "space.mixers: operator 'gru' is unknown"),
        ({"mixers": ["attention(head_dim=128)"]}, "space.mixers: no width of"),
        ({"ratios": ["2"]}, "space.ratios: a ratio is two numbers"),
        ({"max_operators": 3}, "space.seeds.transformer: is not in the space"),
        ({"widths": []}, "space.widths: must not be empty"),
        ({"reference": {"seed": "gpt", "width": 32}}, "space.reference.seed: 'gpt' is not among"),
        ({"reference": {"seed": "hybrid", "width": 33}}, "space.reference.width: must be one of"),
        ({"max_blocks": 0, "max_operators": 0}, "space.max_operators: must be >= 1, got 0"),
    ],
)
def test_problems_name_field_and_value(changes, message):
    with pytest.raises(ConfigError) as error:
        space_config(**changes)
    assert any(problem.startswith(message) for problem in error.value.problems)
