"""The search space: which hybrids exist, how to draw one, change one, and how wide to build it.

Follows Nemotron-Flash (arXiv 2511.18890): up to three block types of at most two
mixers, their ratio, the FFNs after each mixer, how many blocks; the width follows from the latency
target. The order of the blocks is free.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from search.genotype import (
    ALONE,
    BlockType,
    Genotype,
    Rules,
    decompose,
    parse_ratio,
    short_form,
)
from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.model_config import BlockConfig
from slm.operators import OperatorConfig, parse_operator

MUTATION_ATTEMPTS = 200


@schema
class SeedConfig:
    """A genotype to start from, written as in a model config.

    blocks: the kinds of block, each under a letter; pattern: their order, repeated up to `depth`.
    """

    blocks: dict[str, BlockConfig]
    depth: int
    pattern: str = "A"

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

    mixers, ffn: the operators there are, each 'name' or 'name(field=value,…)'.
    ratios: copies of a block's first and second mixer; '0:1' is a block of one mixer.
    ffns_per_mixer: how many FFNs may follow each mixer of a block.
    max_operators, max_blocks: limits of the whole model.
    widths: sizes of the residual stream; the widest that meets the latency target is taken.
    seeds: the first candidates, by name. reference: one of them, at a width.
    The rest is as in `Architecture`, the same for all candidates.
    """

    mixers: tuple[str, ...]
    ffn: str
    ratios: tuple[str, ...]
    ffns_per_mixer: tuple[int, ...]
    max_block_types: int
    max_blocks: int
    max_operators: int
    widths: tuple[int, ...]
    seeds: dict[str, SeedConfig]
    reference: ReferenceConfig
    meta_tokens: int = 0
    tie_embeddings: bool = True
    normalize_logits: bool = False

    def __post_init__(self) -> None:
        problems = self._problems_of_limits() + self._problems_of_operators()
        if not problems:
            problems = self._problems_of_seeds()
        if problems:
            raise ConfigError(problems)

    def _problems_of_limits(self) -> list[str]:
        found = [
            f"{name}: must be >= 1, got {getattr(self, name)}"
            for name in ("max_block_types", "max_blocks", "max_operators")
            if getattr(self, name) < 1
        ]
        for name in ("mixers", "ratios", "ffns_per_mixer", "widths", "seeds"):
            if not getattr(self, name):
                found.append(f"{name}: must not be empty")
        found += [f"widths: must be >= 1, got {width}" for width in self.widths if width < 1]
        found += [
            f"ffns_per_mixer: must be >= 0, got {count}"
            for count in self.ffns_per_mixer
            if count < 0
        ]
        for ratio in self.ratios:
            try:
                parse_ratio(ratio)
            except ValueError as error:
                found.append(f"ratios: {error}")
        return found

    def _problems_of_operators(self) -> list[str]:
        found = []
        for name, text in [("mixers", mixer) for mixer in self.mixers] + [("ffn", self.ffn)]:
            try:
                operator = parse_operator(text)
            except ValueError as error:
                found.append(f"{name}: {error}")
                continue
            if all(operator.problems(width) for width in self.widths):
                found.append(f"{name}: no width of {list(self.widths)} can take {text}")
        return found

    def _problems_of_seeds(self) -> list[str]:
        found = []
        space = SearchSpace(self)
        for name, seed in self.seeds.items():
            unknown = sorted(set(seed.pattern) - set(seed.blocks))
            if unknown or not seed.pattern or seed.depth < 1:
                found.append(
                    f"seeds.{name}: pattern {seed.pattern!r}, depth {seed.depth}: no model"
                )
            elif space.decompose(seed.operators()) is None:
                found.append(f"seeds.{name}: is not in the space: {' '.join(seed.operators())}")
        if self.reference.seed not in self.seeds:
            known = ", ".join(self.seeds)
            found.append(f"reference.seed: {self.reference.seed!r} is not among seeds ({known})")
        elif not found:
            genotype = space.seed(self.reference.seed)
            if self.reference.width not in space.available_widths(genotype):
                found.append(
                    f"reference.width: must be one of {space.available_widths(genotype)}, "
                    f"got {self.reference.width}"
                )
        return found


@dataclass(frozen=True)
class Mutation:
    """A genotype made from another by changing one factor of it."""

    factor: str
    genotype: Genotype


class SearchSpace:
    """Draws, changes and realizes the genotypes of a `SpaceConfig`."""

    def __init__(self, config: SpaceConfig) -> None:
        self.config = config
        self.mixers = tuple(str(parse_operator(mixer)) for mixer in config.mixers)
        self.ffn = str(parse_operator(config.ffn))
        self.rules = Rules(
            mixers=frozenset(self.mixers),
            ratios=tuple(sorted(parse_ratio(ratio) for ratio in config.ratios)),
            ffns_per_mixer=config.ffns_per_mixer,
            max_block_types=config.max_block_types,
            max_blocks=config.max_blocks,
        )

    # Membership

    def decompose(self, operators: tuple[str, ...]) -> Genotype | None:
        """The canonical genotype of a sequence of operators; None outside the space."""
        if len(operators) > self.config.max_operators:
            return None
        genotype = decompose(operators, self.ffn, self.rules)
        return genotype if genotype is not None and self.available_widths(genotype) else None

    def canonical(self, genotype: Genotype) -> Genotype:
        """The one genotype that stands for all those of the same architecture."""
        canonical = self.decompose(genotype.operators(self.ffn))
        assert canonical is not None, f"{genotype} is outside the space"
        return canonical

    def allows(self, genotype: Genotype) -> bool:
        """Whether the genotype is in the space."""
        return (
            self.rules.allow(genotype)
            and len(genotype.operators(self.ffn)) <= self.config.max_operators
            and bool(self.available_widths(genotype))
        )

    def contains(self, architecture: Architecture) -> bool:
        """Whether the architecture, whatever its vocabulary, is in the space."""
        config = self.config
        return (
            architecture.width in config.widths
            and architecture.meta_tokens == config.meta_tokens
            and architecture.tie_embeddings == config.tie_embeddings
            and architecture.normalize_logits == config.normalize_logits
            and self.decompose(tuple(map(str, architecture.operators))) is not None
        )

    def genotypes(self) -> Iterator[Genotype]:
        """Every genotype once, those of few blocks first; of a large space there is no end."""
        types = [
            BlockType(mixers, ratio, ffns)
            for ratio in self._ratios
            for mixers in itertools.permutations(self.mixers, 1 if ratio == ALONE else 2)
            for ffns in self.config.ffns_per_mixer
        ]
        seen: set[tuple[str, ...]] = set()
        for length in range(1, self.config.max_blocks + 1):
            for sequence in itertools.product(types, repeat=length):
                genotype = Genotype.from_sequence(sequence)
                operators = genotype.operators(self.ffn)
                if operators not in seen and self.allows(genotype):
                    seen.add(operators)
                    yield self.canonical(genotype)

    def size(self, limit: int) -> int | None:
        """How many genotypes there are; None if they are more than `limit`."""
        count = sum(1 for _ in itertools.islice(self.genotypes(), limit + 1))
        return count if count <= limit else None

    # From genotype to architecture

    def realize(self, genotype: Genotype, width: int, vocab_size: int) -> Architecture:
        """The architecture of a genotype at a width."""
        return Architecture(
            width=width,
            vocab_size=vocab_size,
            operators=tuple(parse_operator(text) for text in genotype.operators(self.ffn)),
            meta_tokens=self.config.meta_tokens,
            tie_embeddings=self.config.tie_embeddings,
            normalize_logits=self.config.normalize_logits,
        )

    def available_widths(self, genotype: Genotype) -> list[int]:
        """The space's widths that all the genotype's operators can take, widest first."""
        operators = set(genotype.operators(self.ffn))
        return [
            width
            for width in sorted(set(self.config.widths), reverse=True)
            if all(width in self._widths_of[operator] for operator in operators)
        ]

    def fitting(
        self,
        genotype: Genotype,
        vocab_size: int,
        predict_ms: Callable[[Architecture], float],
        target_ms: float,
    ) -> list[Architecture]:
        """Realizations whose predicted latency is at most `target_ms`, widest first.

        The widest that meets the target is the candidate: losses are compared at equal latency.
        """
        return [
            architecture
            for width in self.available_widths(genotype)
            if predict_ms(architecture := self.realize(genotype, width, vocab_size)) <= target_ms
        ]

    def operators(self) -> list[tuple[OperatorConfig, int]]:
        """Every operator of the space at every width that it can take."""
        return [
            (parse_operator(text), width)
            for text, widths in self._widths_of.items()
            for width in sorted(widths)
        ]

    @cached_property
    def _widths_of(self) -> dict[str, set[int]]:
        return {
            text: {w for w in self.config.widths if not parse_operator(text).problems(w)}
            for text in (*self.mixers, self.ffn)
        }

    # Starts

    def seed(self, name: str) -> Genotype:
        """The named start."""
        genotype = self.decompose(self.config.seeds[name].operators())
        assert genotype is not None, f"seed {name} is outside the space"
        return genotype

    def reference(self, vocab_size: int) -> Architecture:
        """The architecture that is the yardstick for latency."""
        reference = self.config.reference
        return self.realize(self.seed(reference.seed), reference.width, vocab_size)

    def sample(self, rng: random.Random) -> Genotype:
        """A random genotype: block types, then how long, then the order."""
        while True:
            types = [self._sample_block(rng) for _ in range(rng.randint(1, self._max_types))]
            length = rng.randint(self.config.max_operators // 2, self.config.max_operators)
            sequence: list[BlockType] = []
            while len(sequence) < self.config.max_blocks:
                block = rng.choice(types)
                length -= len(block.operators(self.ffn))
                if length < 0:
                    break
                sequence.append(block)
            genotype = Genotype.from_sequence(sequence)
            if self.allows(genotype):
                return self.canonical(genotype)

    def _sample_block(self, rng: random.Random) -> BlockType:
        ratio = rng.choice(self._ratios)
        mixers = tuple(rng.sample(self.mixers, 1 if ratio == ALONE else 2))
        return BlockType(mixers, ratio, rng.choice(self.config.ffns_per_mixer))

    @property
    def _max_types(self) -> int:
        return min(self.config.max_block_types, self.config.max_blocks)

    @property
    def _ratios(self) -> list[tuple[int, int]]:
        """Ratios that the mixers suffice for."""
        return [ratio for ratio in self.rules.ratios if ratio == ALONE or len(self.mixers) > 1]

    # Mutation

    def mutate(self, genotype: Genotype, rng: random.Random) -> Mutation | None:
        """Change one factor of a genotype; None if nothing can change.

        The factors are Nemotron-Flash's (a mixer of a block type, its ratio, its FFNs per mixer,
        how many blocks) and the order of the blocks. A change of a block type concerns all its
        copies or a run of them, which then is a type of its own. The result is not canonical yet.
        """
        changes = {
            "operator": self._change_operator,
            "ratio": self._change_ratio,
            "ffns_per_mixer": self._change_ffns,
        }
        for _ in range(MUTATION_ATTEMPTS):
            factor = rng.choice([*changes, "count", "order"])
            if factor in changes:
                sequence = _change_type(genotype, changes[factor], rng)
            else:
                sequence = (_change_count if factor == "count" else _swap)(genotype, rng)
            child = Genotype.from_sequence(sequence)
            if child.sequence != genotype.sequence and self.allows(child):
                return Mutation(factor, child)
        return None

    def _change_operator(self, block: BlockType, rng: random.Random) -> BlockType:
        others = [mixer for mixer in self.mixers if mixer not in block.mixers]
        if not others:
            return block
        mixers = list(block.mixers)
        mixers[rng.randrange(len(mixers))] = rng.choice(others)
        return replace(block, mixers=tuple(mixers))

    def _change_ratio(self, block: BlockType, rng: random.Random) -> BlockType:
        others = [ratio for ratio in self._ratios if ratio != block.ratio]
        if not others:
            return block
        ratio = rng.choice(others)
        mixers = list(block.mixers)
        if ratio == ALONE:
            mixers = [rng.choice(mixers)]
        elif len(mixers) == 1:
            partners = [mixer for mixer in self.mixers if mixer not in mixers]
            mixers.insert(rng.randrange(2), rng.choice(partners))
        return replace(block, mixers=tuple(mixers), ratio=ratio)

    def _change_ffns(self, block: BlockType, rng: random.Random) -> BlockType:
        others = [count for count in self.config.ffns_per_mixer if count != block.ffns_per_mixer]
        return replace(block, ffns_per_mixer=rng.choice(others)) if others else block

    # For people

    @cached_property
    def legend(self) -> dict[str, str]:
        """The short name of every operator."""
        legend: dict[str, str] = {}
        for text in (*self.mixers, self.ffn):
            operator = parse_operator(text)
            name = operator.short_name or operator.name
            if getattr(operator, "window", None) is not None:
                name = "W"
            taken = sum(other.rstrip("'") == name for other in legend.values())
            legend[text] = name + "'" * taken
        return legend

    def short_form(self, genotype: Genotype) -> str:
        """The genotype in a few letters: '2×[D F M2 F] [A F]'."""
        return short_form(genotype, self.ffn, self.legend)


def _change_type(
    genotype: Genotype,
    change: Callable[[BlockType, random.Random], BlockType],
    rng: random.Random,
) -> list[BlockType]:
    """Change all copies of a block type, or a run of them."""
    sequence = list(genotype.sequence)
    block = rng.choice(genotype.blocks)
    places = [place for place, other in enumerate(sequence) if other == block]
    if rng.random() < 0.5:
        start = rng.randrange(len(places))
        places = places[start : rng.randint(start + 1, len(places))]
    changed = change(block, rng)
    for place in places:
        sequence[place] = changed
    return sequence


def _change_count(genotype: Genotype, rng: random.Random) -> list[BlockType]:
    """Add a copy of a block type somewhere, or remove a block."""
    sequence = list(genotype.sequence)
    if rng.random() < 0.5:
        sequence.insert(rng.randint(0, len(sequence)), rng.choice(genotype.blocks))
    else:
        del sequence[rng.randrange(len(sequence))]
    return sequence


def _swap(genotype: Genotype, rng: random.Random) -> list[BlockType]:
    """Exchange two blocks."""
    sequence = list(genotype.sequence)
    first, second = rng.randrange(len(sequence)), rng.randrange(len(sequence))
    sequence[first], sequence[second] = sequence[second], sequence[first]
    return sequence
