"""The search space: which hybrids exist, how to draw one, change one, and how wide to build it.

Follows Nemotron-Flash (arXiv 2511.18890): up to three block types of at most two
mixers, their ratio, the FFNs after each mixer, how many blocks; the width follows from the latency
target. Beyond it the order of the blocks is free, and the kind of FFN, the meta tokens and the
width can be factors.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from typing import Literal, TypeVar

from search.constraints import ConstraintsConfig
from search.genotype import (
    ALONE,
    BlockType,
    Genotype,
    Rules,
    decompose,
    parse_ratio,
    short_form,
)
from search.space_size import size_bounds
from search.variation import Choose, Mutation, change_factor, cross, every
from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.model_config import BlockConfig
from slm.operators import OperatorConfig, parse_operator

T = TypeVar("T")
SAMPLE_ATTEMPTS = 10_000
# Of a random mutation or crossover, before all of them are gone through.
VARIATION_ATTEMPTS = 200
# Genotypes of which is remembered what they are: a search comes back to the same ones.
NUM_REMEMBERED = 2**15


@schema
class SeedConfig:
    """A genotype to start from, written as in a model config.

    blocks: the kinds of block, each under a letter; pattern: their order, repeated up to `depth`.
    meta_tokens: None: the first of the space's.
    width: where it is a factor; None: that of the reference.
    """

    blocks: dict[str, BlockConfig]
    depth: int
    pattern: str = "A"
    meta_tokens: int | None = None
    width: int | None = None

    def operators(self) -> tuple[str, ...]:
        """The whole sequence of operators, as canonical text."""
        letters = (self.pattern * self.depth)[: self.depth]
        return tuple(str(op) for letter in letters for op in self.blocks[letter].parse())


@schema
class ReferenceConfig:
    """The architecture whose measured latency is the target when none is given."""

    seed: str
    width: int


@schema
class SpaceConfig:
    """What a search chooses from.

    mixers: the mixers there are, each 'name' or 'name(field=value,…)'. Heads, state sizes and
        windows are chosen among several spellings of one.
    ffns: the kinds of FFN; a model has one of them.
    ratios: copies of a block's first and second mixer; '0:1' is a block of one mixer.
    ffns_per_mixer: how many FFNs may follow each mixer of a block.
    max_operators, max_blocks: limits of the whole model.
    widths: sizes of the residual stream. width: 'widest', the widest that meets the latency target
        is taken; 'free', it is a factor, depth against width.
    meta_tokens: how many a model may have.
    seeds: the first candidates, by name. reference: one of them, at a width.
    constraints: what candidates must be besides fast enough.
    The rest is as in `Architecture`, the same for all candidates.
    """

    mixers: tuple[str, ...]
    ffns: tuple[str, ...]
    ratios: tuple[str, ...]
    ffns_per_mixer: tuple[int, ...]
    max_block_types: int
    max_blocks: int
    max_operators: int
    widths: tuple[int, ...]
    seeds: dict[str, SeedConfig]
    reference: ReferenceConfig
    width: Literal["widest", "free"] = "widest"
    meta_tokens: tuple[int, ...] = (0,)
    constraints: ConstraintsConfig = ConstraintsConfig()
    tie_embeddings: bool = True
    normalize_logits: bool = False

    def __post_init__(self) -> None:
        problems = self._problems_of_limits() + self._problems_of_operators()
        if not problems:
            problems = self._problems_of_constraints() or self._problems_of_seeds()
        if problems:
            raise ConfigError(problems)

    def _problems_of_limits(self) -> list[str]:
        found = [
            f"{name}: must be >= 1, got {getattr(self, name)}"
            for name in ("max_block_types", "max_blocks", "max_operators")
            if getattr(self, name) < 1
        ]
        if not self.seeds:
            found.append("seeds: must not be empty")
        for name in ("mixers", "ffns", "ratios", "ffns_per_mixer", "widths", "meta_tokens"):
            values = getattr(self, name)
            if not values:
                found.append(f"{name}: must not be empty")
            if len(set(values)) < len(values):
                found.append(f"{name}: each must be given once, got {list(values)}")
        for name, least in (("widths", 1), ("ffns_per_mixer", 0), ("meta_tokens", 0)):
            found += [
                f"{name}: must be >= {least}, got {value}"
                for value in getattr(self, name)
                if value < least
            ]
        for ratio in self.ratios:
            try:
                parse_ratio(ratio)
            except ValueError as error:
                found.append(f"ratios: {error}")
        return found

    def _problems_of_operators(self) -> list[str]:
        found = []
        known: dict[OperatorConfig, str] = {}
        for name, text in [("mixers", t) for t in self.mixers] + [("ffns", t) for t in self.ffns]:
            try:
                operator = parse_operator(text)
            except ValueError as error:
                found.append(f"{name}: {error}")
                continue
            if known.setdefault(operator, name) != name:
                found.append(f"{name}: {text} is among {known[operator]}")
            if all(operator.problems(width) for width in self.widths):
                found.append(f"{name}: no width of {list(self.widths)} can take {text}")
        return found

    def _problems_of_constraints(self) -> list[str]:
        mixers, ffns = map(parse_operator, self.mixers), map(parse_operator, self.ffns)
        found = self.constraints.problems(list(mixers), list(ffns), self.max_operators)
        return [f"constraints.{problem}" for problem in found]

    def _problems_of_seeds(self) -> list[str]:
        space, reference = SearchSpace(self), self.reference
        if reference.seed not in self.seeds:
            known = ", ".join(self.seeds)
            return [f"reference.seed: {reference.seed!r} is not among seeds ({known})"]
        if reference.width not in self.widths:
            widths = list(self.widths)
            return [f"reference.width: must be one of {widths}, got {reference.width}"]
        found = []
        for name, seed in self.seeds.items():
            if not seed.pattern or set(seed.pattern) - set(seed.blocks) or seed.depth < 1:
                found.append(
                    f"seeds.{name}: pattern {seed.pattern!r}, depth {seed.depth}: no model"
                )
            elif self.width == "widest" and seed.width is not None:
                found.append(f"seeds.{name}.width: must be null, it is no factor, got {seed.width}")
            elif space.find_seed(name) is None:
                found.append(f"seeds.{name}: is not in the space: {self._why_not(seed, space)}")
        if not found:
            widths = space.common_widths(space.seed(reference.seed).operators)
            if reference.width not in widths:
                found.append(f"reference.width: must be one of {widths}, got {reference.width}")
        return found

    @staticmethod
    def _why_not(seed: SeedConfig, space: SearchSpace) -> str:
        """The constraints that a seed misses, else what it is."""
        problems = [f"constraints.{text}" for text in space.structure.problems(seed.operators())]
        factors = {"meta_tokens": seed.meta_tokens, "width": seed.width}
        given = [f"{name}={value}" for name, value in factors.items() if value is not None]
        return "; ".join(problems) or " ".join([*given, *seed.operators()])


class SearchSpace:
    """Draws, changes and realizes the genotypes of a `SpaceConfig`."""

    def __init__(self, config: SpaceConfig) -> None:
        self.config = config
        mixers = config.constraints.allowed([parse_operator(text) for text in config.mixers])
        ffns = config.constraints.allowed([parse_operator(text) for text in config.ffns])
        self.structure = config.constraints.structure([*mixers, *ffns])
        ratios = sorted(parse_ratio(ratio) for ratio in config.ratios)
        self.rules = Rules(
            mixers=tuple(map(str, mixers)),
            ratios=tuple(ratio for ratio in ratios if ratio == ALONE or len(mixers) > 1),
            ffns_per_mixer=config.ffns_per_mixer,
            ffns=tuple(map(str, ffns)),
            meta_tokens=config.meta_tokens,
            widths=config.widths if config.width == "free" else (None,),
            max_block_types=config.max_block_types,
            max_blocks=config.max_blocks,
            max_operators=config.max_operators,
        )
        self._widths_of = {
            str(operator): {width for width in config.widths if not operator.problems(width)}
            for operator in (*mixers, *ffns)
        }
        self._remembered_allows = lru_cache(NUM_REMEMBERED)(self._allows)
        self._remembered_canonical = lru_cache(NUM_REMEMBERED)(self._canonical)

    # Membership

    def decompose(
        self,
        operators: tuple[str, ...],
        meta_tokens: int | None = None,
        width: int | None = None,
    ) -> Genotype | None:
        """The canonical genotype of a sequence of operators; None outside the space.

        meta_tokens: None: the first of the space's. width: None unless it is a factor.
        """
        kinds = [ffn for ffn in self.rules.ffns if ffn in operators]
        # The kind of FFN of a model without any is the first: one architecture, one genotype.
        ffn = kinds[0] if kinds else self.rules.ffns[0]
        sequence = decompose(operators, ffn, self.rules) if len(kinds) <= 1 else None
        if sequence is None:
            return None
        if meta_tokens is None:
            meta_tokens = self.rules.meta_tokens[0]
        genotype = Genotype.from_sequence(sequence, ffn, meta_tokens, width)
        return genotype if self.allows(genotype) else None

    def canonical(self, genotype: Genotype) -> Genotype:
        """The one genotype that stands for all those of the same architecture."""
        return self._remembered_canonical(genotype)

    def _canonical(self, genotype: Genotype) -> Genotype:
        canonical = self.decompose(*genotype.phenotype())
        assert canonical is not None, f"{genotype} is outside the space"
        return canonical

    def allows(self, genotype: Genotype) -> bool:
        """Whether the genotype is in the space and meets the constraints on its operators."""
        return self._remembered_allows(genotype)

    def _allows(self, genotype: Genotype) -> bool:
        return (
            self.rules.allow(genotype)
            and not self.structure.problems(genotype.operators)
            and bool(self.available_widths(genotype))
        )

    def contains(self, architecture: Architecture) -> bool:
        """Whether the architecture, whatever its vocabulary and size, is in the space."""
        config = self.config
        operators = tuple(map(str, architecture.operators))
        width = architecture.width if config.width == "free" else None
        return (
            architecture.width in self.common_widths(operators)
            and architecture.tie_embeddings == config.tie_embeddings
            and architecture.normalize_logits == config.normalize_logits
            and self.decompose(operators, architecture.meta_tokens, width) is not None
        )

    def size_problems(self, architecture: Architecture) -> list[str]:
        """Which constraints on its size an architecture misses; empty when it meets them."""
        return self.config.constraints.size_problems(architecture)

    def genotypes(self) -> Iterator[Genotype]:
        """Every genotype once, those of few blocks first; of a large space there is no end."""
        rules = self.rules
        for length in range(1, rules.max_blocks + 1):
            for sequence in rules.sequences(length):
                for factors in itertools.product(rules.ffns, rules.meta_tokens, rules.widths):
                    genotype = Genotype.from_sequence(sequence, *factors)
                    if self.allows(genotype) and self.canonical(genotype) == genotype:
                        yield genotype

    def size(self, limit: int) -> int | None:
        """How many genotypes there are; None if they are more than `limit`."""
        low, high = self.size_bounds()
        if low == high or low > limit:
            return low if low <= limit else None
        count = sum(1 for _ in itertools.islice(self.genotypes(), limit + 1))
        return count if count <= limit else None

    def size_bounds(self) -> tuple[int, int]:
        """Numbers between which the number of genotypes lies, both included."""
        return size_bounds(self.rules, self.structure, self._widths_of)

    # From genotype to architecture

    def realize(self, genotype: Genotype, width: int, vocab_size: int) -> Architecture:
        """The architecture of a genotype at a width."""
        return Architecture(
            width=width,
            vocab_size=vocab_size,
            operators=tuple(parse_operator(text) for text in genotype.operators),
            meta_tokens=genotype.meta_tokens,
            tie_embeddings=self.config.tie_embeddings,
            normalize_logits=self.config.normalize_logits,
        )

    def available_widths(self, genotype: Genotype) -> list[int]:
        """The widths at which the genotype is in the space, widest first."""
        widths = self.common_widths(genotype.operators)
        return [width for width in widths if genotype.width in (None, width)]

    def common_widths(self, operators: tuple[str, ...]) -> list[int]:
        """The space's widths that all of its operators can take, widest first."""
        distinct = set(operators)
        return [
            width
            for width in sorted(self.config.widths, reverse=True)
            if all(width in self._widths_of.get(operator, ()) for operator in distinct)
        ]

    def fitting(
        self,
        genotype: Genotype,
        vocab_size: int,
        is_fast_enough: Callable[[Architecture], bool],
    ) -> list[Architecture]:
        """Realizations that keep the limits of size and are predicted fast enough, widest first.

        The widest that meets the targets is the candidate: losses are compared at equal latency.
        """
        architectures = (
            self.realize(genotype, width, vocab_size) for width in self.available_widths(genotype)
        )
        return [
            architecture
            for architecture in architectures
            if not self.size_problems(architecture) and is_fast_enough(architecture)
        ]

    def operators(self) -> list[tuple[OperatorConfig, int]]:
        """Every operator of the space at every width that it can take."""
        return [
            (parse_operator(text), width)
            for text, widths in self._widths_of.items()
            for width in sorted(widths)
        ]

    # Starts

    def seed(self, name: str) -> Genotype:
        """The named start."""
        genotype = self.find_seed(name)
        assert genotype is not None, f"seed {name} is outside the space"
        return genotype

    @cached_property
    def seeds(self) -> dict[str, Genotype]:
        """All starts by their names."""
        return {name: self.seed(name) for name in self.config.seeds}

    def find_seed(self, name: str) -> Genotype | None:
        """The named start; None outside the space."""
        seed = self.config.seeds[name]
        width = seed.width or self.config.reference.width if self.config.width == "free" else None
        return self.decompose(seed.operators(), seed.meta_tokens, width)

    def reference(self, vocab_size: int) -> Architecture:
        """The architecture that is the yardstick for latency."""
        reference = self.config.reference
        return self.realize(self.seed(reference.seed), reference.width, vocab_size)

    def sample(self, rng: random.Random) -> Genotype:
        """A random genotype: block types, then how long, then the order.

        Raises ConfigError if many are drawn and none is in the space.
        """
        for _ in range(SAMPLE_ATTEMPTS):
            genotype = self._draw(rng)
            if self.allows(genotype):
                return self.canonical(genotype)
        raise ConfigError(
            [
                f"space: none of {SAMPLE_ATTEMPTS} random models keeps to its limits and to the "
                f"constraints ({str(self.config.constraints) or 'none are set'})"
            ]
        )

    def _draw(self, rng: random.Random) -> Genotype:
        """A random genotype that may miss the constraints."""
        rules = self.rules
        max_types = min(rules.max_block_types, rules.max_blocks)
        types = [self._draw_block(rng) for _ in range(rng.randint(1, max_types))]
        left = rng.randint(1, rules.max_operators)
        sequence = [rng.choice(types)]
        while len(sequence) < rules.max_blocks:
            left -= sequence[-1].num_operators
            block = rng.choice(types)
            if block.num_operators > left:
                break
            sequence.append(block)
        return Genotype.from_sequence(
            sequence,
            ffn=_pick(rules.ffns, rng),
            meta_tokens=_pick(rules.meta_tokens, rng),
            width=_pick(rules.widths, rng),
        )

    def _draw_block(self, rng: random.Random) -> BlockType:
        ratio = rng.choice(self.rules.ratios)
        mixers = tuple(rng.sample(self.rules.mixers, 1 if ratio == ALONE else 2))
        return BlockType(mixers, ratio, rng.choice(self.rules.ffns_per_mixer))

    # Variation

    def mutate(self, genotype: Genotype, rng: random.Random) -> Mutation | None:
        """Change one factor of a genotype, see `change_factor`; None if nothing can change.

        The result is another architecture of the space; it is not canonical yet.
        """
        if not self.rules.factors:
            return None
        return self._vary(
            partial(change_factor, genotype, self.rules),
            lambda child: self._is_new(child.genotype, genotype),
            rng,
        )

    def crossover(self, first: Genotype, second: Genotype, rng: random.Random) -> Genotype | None:
        """Blocks and factors of two parents, see `cross`; canonical.

        None if all their children are one of them, or outside the space.
        """
        child = self._vary(
            partial(cross, first, second),
            lambda child: self._is_new(child, first, second),
            rng,
        )
        return child and self.canonical(child)

    def neighbours(self, genotype: Genotype) -> Iterator[Genotype]:
        """Every genotype that is one mutation away: canonical, once, in the same order always."""
        if not self.rules.factors:
            return
        seen = {genotype.phenotype()}
        for child in every(partial(change_factor, genotype, self.rules)):
            phenotype = child.genotype.phenotype()
            if phenotype not in seen and self.allows(child.genotype):
                seen.add(phenotype)
                yield self.canonical(child.genotype)

    def _is_new(self, child: Genotype, *parents: Genotype) -> bool:
        """Whether the child is in the space, and another architecture than its parents."""
        known = [parent.phenotype() for parent in parents]
        return self.allows(child) and child.phenotype() not in known

    @staticmethod
    def _vary(
        draw: Callable[[Choose], T], accepts: Callable[[T], bool], rng: random.Random
    ) -> T | None:
        """A random outcome of `draw` that is accepted; None if there is none."""
        for _ in range(VARIATION_ATTEMPTS):
            if accepts(outcome := draw(rng.choice)):
                return outcome
        outcomes = list(filter(accepts, every(draw)))
        return rng.choice(outcomes) if outcomes else None

    # For people

    @cached_property
    def legend(self) -> dict[str, str]:
        """The short name of every operator."""
        legend: dict[str, str] = {}
        for text in (*self.rules.mixers, *self.rules.ffns):
            operator = parse_operator(text)
            name = operator.short_name or operator.name
            if getattr(operator, "window", None) is not None:
                name = "W"
            taken = sum(other.rstrip("'") == name for other in legend.values())
            legend[text] = name + "'" * taken
        return legend

    def short_form(self, genotype: Genotype) -> str:
        """The genotype in a few letters, '2×[D F M2 F] [A F]', and what else is a factor."""
        blocks = short_form(genotype, self.legend)
        chosen = [
            f"{letter}={getattr(genotype, factor)}"
            for factor, letter in (("meta_tokens", "m"), ("width", "w"))
            if factor in self.rules.factors
        ]
        return " ".join([blocks, *chosen])


def _pick(values: Sequence[T], rng: random.Random) -> T:
    """A random value; nothing is drawn where there is no choice."""
    return rng.choice(values) if len(values) > 1 else values[0]
