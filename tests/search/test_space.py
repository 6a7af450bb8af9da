import itertools
import json
import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_space import ATTENTION, DELTANET, FFN, MAMBA2, WIDE_FFN, factors_config, space_config

from search.genotype import BlockType, Genotype
from search.space import SearchSpace, SpaceConfig
from slm.architecture import Architecture
from slm.config import CONFIG_DIR, ConfigError, compose, read
from slm.model_config import ModelConfig
from slm.operators import FFN as FFN_MODULE
from slm.operators import OPERATORS, FFNConfig, parse_operator, register

SPACE = SearchSpace(space_config())
# Every factor of the whole model is one, too.
FACTORS = SearchSpace(factors_config())
ONE_MIXER = SearchSpace(
    space_config(
        mixers=[ATTENTION],
        ratios=["0:1", "1:1"],
        max_block_types=2,
        seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
        reference={"seed": "t", "width": 16},
    )
)
# Not to be had at width 16.
WIDE_HEADS = "deltanet(head_dim=32)"
TRANSFORMER = {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 2}
seeds = st.integers(0, 10**9).map(random.Random)


def composed_space(name: str) -> SpaceConfig:
    config = compose("search", [f"space={name}", "target_ms=1"])[0]
    return read(SpaceConfig, config.space, "space")


@given(seeds)
def test_samples_are_in_the_space_and_canonical(rng):
    for space in (SPACE, ONE_MIXER, FACTORS):
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
        ],
        FFN,
    )
    assert spelling.operators == genotype.operators
    assert SPACE.decompose(spelling.operators) == genotype
    assert SPACE.canonical(spelling) == genotype


@given(seeds)
def test_json_round_trip(rng):
    for space in (SPACE, FACTORS):
        genotype = space.sample(rng)
        assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype


def test_blocks_read_as_published():
    block = BlockType((DELTANET, MAMBA2), (1, 2), ffns_per_mixer=1)
    assert block.operators(FFN) == (DELTANET, FFN, MAMBA2, FFN, MAMBA2, FFN)
    with pytest.raises(ValueError, match="2 different mixers"):
        BlockType((MAMBA2, MAMBA2), (1, 1))


def test_short_form_groups_equal_blocks():
    delta, attention = BlockType((DELTANET,)), BlockType((ATTENTION,), ffns_per_mixer=2)
    genotype = Genotype.from_sequence([delta, delta, attention], FFN)
    assert SPACE.short_form(genotype) == "2×[D F] [A F F]"
    assert SPACE.legend["attention(head_dim=16,window=8)"] == "W"
    assert SPACE.legend[MAMBA2] == "M2"
    other = Genotype.from_sequence([delta, attention], WIDE_FFN, meta_tokens=4, width=32)
    assert FACTORS.short_form(other) == "[D F'] [A F' F'] m=4 w=32"


def test_an_operator_without_a_short_name_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(type(parse_operator(DELTANET)), "short_name", "")
    assert SearchSpace(space_config()).legend[DELTANET] == "deltanet"


def test_widest_that_meets_the_target():
    genotype = SPACE.seed("hybrid")

    def widths(most: int) -> list[int]:
        return [a.width for a in SPACE.fitting(genotype, 64, lambda a: a.width <= most)]

    assert widths(33) == [32, 16]
    assert widths(15) == []


def test_a_width_that_an_operator_cannot_take_is_unavailable():
    space = SearchSpace(
        space_config(
            mixers=[ATTENTION, "deltanet(head_dim=32)"],
            widths=[16, 32],
            seeds={"t": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 1}},
            reference={"seed": "t", "width": 16},
        )
    )
    narrow = Genotype.from_sequence([BlockType((ATTENTION,))], FFN)
    wide = Genotype.from_sequence([BlockType((ATTENTION, "deltanet(head_dim=32)"), (1, 1))], FFN)
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


def test_the_published_search_has_every_attention_in_a_window():
    """What it finds is in the whole space, and so is the same with full attention."""
    published = SearchSpace(composed_space("nemotron_flash_window"))
    whole = SearchSpace(composed_space("nemotron_flash"))
    rng = random.Random(0)
    starts = [published.seed(name) for name in published.config.seeds]
    found = [*starts, *(published.sample(rng) for _ in range(20))]
    num_windows = 0
    for genotype in found:
        architecture = published.realize(genotype, published.available_widths(genotype)[0], 1024)
        windows = [op.window for op in architecture.operators if op.name == "attention"]
        assert set(windows) <= {512}
        num_windows += len(windows)
        lifted = Architecture.parse(str(architecture).replace(",window=512", ""))
        assert whole.contains(architecture)
        assert whole.contains(lifted)
        assert published.contains(lifted) == (not windows)
    assert num_windows > 20
    released = Architecture.parse(str(whole.realize(whole.seed("nemotron_flash_1b"), 2048, 1024)))
    searched = str(published.realize(published.seed("nemotron_flash_1b"), 2048, 1024))
    assert str(released) == searched.replace(",window=512", "")


@st.composite
def small_spaces(draw: st.DrawFn) -> SearchSpace:
    """Spaces that can be enumerated."""
    mixers = draw(
        st.sampled_from([[ATTENTION], [ATTENTION, MAMBA2], [ATTENTION, MAMBA2, WIDE_HEADS]])
    )
    max_blocks = draw(st.integers(1, 3))
    ratios = draw(st.sampled_from([["0:1"], ["0:1", "1:1"], ["0:1", "1:2", "2:1"], ["1:2", "0:1"]]))
    return SearchSpace(
        space_config(
            mixers=mixers,
            ffns=draw(st.sampled_from([[FFN], [FFN, WIDE_FFN]])),
            ratios=ratios,
            ffns_per_mixer=draw(st.sampled_from([[1], [0, 1], [0, 1, 2]])),
            max_block_types=draw(st.integers(1, 3)),
            max_blocks=max_blocks,
            max_operators=draw(st.integers(2, 5)),
            meta_tokens=draw(st.sampled_from([[0], [0, 4]])),
            width=draw(st.sampled_from(["widest", "free"])),
            widths=draw(st.sampled_from([[32], [16, 32]])),
            seeds={"t": {**TRANSFORMER, "depth": 1}},
            reference={"seed": "t", "width": 32},
        )
    )


def brute_force(space: SearchSpace) -> set[tuple[tuple[str, ...], int, int | None]]:
    """Operators, meta tokens and width of everything that the config describes."""
    config = space.config
    shapes = []
    for ratio, count in itertools.product(config.ratios, config.ffns_per_mixer):
        num_first, num_second = map(int, ratio.split(":"))
        pairs = itertools.permutations(config.mixers, 2)
        for first, second in pairs if num_first else [("", mixer) for mixer in config.mixers]:
            shapes.append((((first,) * num_first + (second,) * num_second), count))
    found = set()
    for length in range(1, config.max_blocks + 1):
        for sequence in itertools.product(shapes, repeat=length):
            for ffn in config.ffns:
                operators = tuple(
                    operator
                    for mixers, count in sequence
                    for mixer in mixers
                    for operator in (mixer, *[ffn] * count)
                )
                if len(operators) > config.max_operators:
                    continue
                if len(set(sequence)) > config.max_block_types:
                    continue
                parsed = [parse_operator(operator) for operator in operators]
                widths: list[int | None] = [
                    width for width in config.widths if not any(op.problems(width) for op in parsed)
                ]
                if config.width == "widest":
                    widths = [None] if widths else []
                found |= set(itertools.product([operators], config.meta_tokens, widths))
    return found


@settings(max_examples=60, deadline=None)
@given(small_spaces())
def test_genotypes_and_size_are_those_of_brute_force(space):
    expected = brute_force(space)
    genotypes = list(space.genotypes())
    assert len(genotypes) == len(expected)
    assert {genotype.phenotype() for genotype in genotypes} == expected
    assert all(space.canonical(genotype) == genotype for genotype in genotypes)
    assert space.size(len(expected)) == len(expected)
    assert space.size(len(expected) - 1) is None
    low, high = space.size_bounds()
    assert low <= len(expected) <= high
    config = space.config
    if config.ratios == ("0:1",) and (config.width == "free" or WIDE_HEADS not in config.mixers):
        assert low == high == len(expected)


def test_size_of_a_large_space_is_bounded():
    space = SearchSpace(composed_space("nemotron_flash"))
    low, high = space.size_bounds()
    # Thirty blocks of one mixer and no FFN, of at most three of the four mixers, come to these.
    assert 4 * 3**30 - 6 * 2**30 + 4 < low < high < 1.1 * low
    assert space.size(10**6) is None


def test_the_hybrid_bench_is_every_sequence_of_one_to_three_units():
    space = SearchSpace(composed_space("hybrid_bench"))
    texts = [str(space.realize(genotype, 64, 1024)) for genotype in space.genotypes()]
    mixers = [
        "attention(head_dim=32)",
        "mamba2(head_dim=32,state_size=32)",
        "deltanet(head_dim=32)",
    ]
    units = [mixer + ffn for mixer in mixers for ffn in ("", " ffn")]
    # In this order: the benchmark draws from it what it trains with several seeds.
    assert texts == [
        f"width=64 vocab_size=1024 | {' '.join(sequence)}"
        for length in (1, 2, 3)
        for sequence in itertools.product(units, repeat=length)
    ]
    assert len(set(texts)) == 6 + 6**2 + 6**3 == space.size(258) == 258


def test_one_kind_of_ffn_per_model():
    for operators in ((ATTENTION, FFN, DELTANET, FFN), (ATTENTION, WIDE_FFN, DELTANET, WIDE_FFN)):
        genotype = FACTORS.decompose(operators, meta_tokens=4, width=32)
        assert genotype is not None
        assert genotype.ffn == operators[1]
        assert genotype.operators == operators
    assert FACTORS.decompose((ATTENTION, FFN, DELTANET, WIDE_FFN), 4, 32) is None
    # Without any FFN its kind makes no difference.
    bare = [
        Genotype.from_sequence([BlockType((ATTENTION,), (0, 1), 0)], f, 4, 32)
        for f in (FFN, WIDE_FFN)
    ]
    assert bare[0] != bare[1]
    assert FACTORS.canonical(bare[0]) == FACTORS.canonical(bare[1]) == bare[0]


def test_a_free_width_and_meta_tokens_are_the_genotypes():
    genotype = FACTORS.decompose((ATTENTION, FFN), meta_tokens=4, width=32)
    assert genotype is not None
    assert FACTORS.available_widths(genotype) == [32]
    assert FACTORS.decompose((ATTENTION, FFN), meta_tokens=5, width=32) is None
    assert FACTORS.decompose((ATTENTION, FFN), meta_tokens=4, width=24) is None
    assert FACTORS.decompose((ATTENTION, FFN), meta_tokens=4) is None
    architecture = FACTORS.realize(genotype, 32, vocab_size=64)
    assert (architecture.width, architecture.meta_tokens) == (32, 4)
    assert FACTORS.contains(architecture)
    assert [a.width for a in FACTORS.fitting(genotype, 64, lambda _: True)] == [32]
    # A start says its own, or has the first and the reference's.
    assert FACTORS.seed("transformer").meta_tokens == FACTORS.config.meta_tokens[0]
    assert FACTORS.seed("transformer").width == FACTORS.config.reference.width
    assert (FACTORS.seed("narrow").meta_tokens, FACTORS.seed("narrow").width) == (4, 16)


def test_samples_take_every_value_of_every_factor():
    rng = random.Random(0)
    genotypes = [FACTORS.sample(rng) for _ in range(500)]
    rules = FACTORS.rules
    assert {genotype.meta_tokens for genotype in genotypes} == set(rules.meta_tokens)
    assert {genotype.width for genotype in genotypes} == set(rules.widths)
    assert {genotype.ffn for genotype in genotypes} == set(rules.ffns)
    blocks = {block for genotype in genotypes for block in genotype.blocks}
    assert {mixer for block in blocks for mixer in block.mixers} == set(rules.mixers)
    assert {block.ratio for block in blocks} == set(rules.ratios)
    assert {block.ffns_per_mixer for block in blocks} == set(rules.ffns_per_mixer)


def test_an_operator_of_a_users_own_is_searched(monkeypatch):
    monkeypatch.setattr("slm.operators.base.OPERATORS", dict(OPERATORS))

    @dataclass(frozen=True)
    class MixConfig(FFNConfig):
        name: ClassVar[str] = "mix"
        short_name: ClassVar[str] = ""

    class Mix(FFN_MODULE):
        pass

    register(MixConfig)(Mix)
    space = SearchSpace(space_config(mixers=[ATTENTION, DELTANET, "mix(ratio=1.0)"]))
    rng = random.Random(0)
    genotypes = [space.sample(rng) for _ in range(50)]
    with_mix = [genotype for genotype in genotypes if "mix(ratio=1.0)" in genotype.operators]
    assert with_mix
    assert all(space.contains(space.realize(g, 32, vocab_size=64)) for g in with_mix)
    assert "mix" in space.short_form(with_mix[0])


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


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "space").iterdir()))
def test_shipped_spaces_compose(name):
    space = SearchSpace(composed_space(name))
    reference = space.reference(vocab_size=4096)
    assert {operator.name for operator in reference.operators} == {"attention", "ffn"}
    assert all(space.allows(space.seed(seed)) for seed in space.config.seeds)


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
        (
            {"reference": {"seed": "hybrid", "width": 8}, "widths": [8, 16]},
            "space.reference.width: must be one of [16], got 8",
        ),
        ({"ffns": [FFN, ATTENTION]}, f"space.ffns: {ATTENTION} is among mixers"),
        ({"ffns": []}, "space.ffns: must not be empty"),
        ({"meta_tokens": [4, 4]}, "space.meta_tokens: each must be given once, got [4, 4]"),
        ({"meta_tokens": [-1]}, "space.meta_tokens: must be >= 0, got -1"),
        ({"width": "narrowest"}, "space.width: "),
        (
            {"seeds": {"t": {**TRANSFORMER, "width": 32}}, "reference": {"seed": "t", "width": 32}},
            "space.seeds.t.width: must be null, it is no factor, got 32",
        ),
        (
            {
                "seeds": {"t": {**TRANSFORMER, "meta_tokens": 4}},
                "reference": {"seed": "t", "width": 32},
            },
            "space.seeds.t: is not in the space: meta_tokens=4 attention",
        ),
        ({"max_blocks": 0, "max_operators": 0}, "space.max_operators: must be >= 1, got 0"),
    ],
)
def test_problems_name_field_and_value(changes, message):
    with pytest.raises(ConfigError) as error:
        space_config(**changes)
    assert any(problem.startswith(message) for problem in error.value.problems)
