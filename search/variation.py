"""How one genotype becomes another: by one changed factor, or from two parents.

Each is written once, as a function of `choose`: with a random stream's `choice` it is one variation
drawn at random, with `every` it is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from search.genotype import ALONE, BlockType, Genotype, Rules

T = TypeVar("T")
MODEL_FACTORS = ("ffn", "meta_tokens", "width")


class Choose(Protocol):
    """Takes one of several options, of which there is at least one."""

    def __call__(self, options: Sequence[T], /) -> T:
        """The option that is taken."""
        ...


class _Branch:
    """Takes the options at the given indices, then always the first."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        # Of the options there were at each choice.
        self.numbers: list[int] = []

    def __call__(self, options: Sequence[T]) -> T:
        place = len(self.numbers)
        if place == len(self.indices):
            self.indices.append(0)
        self.numbers.append(len(options))
        return options[self.indices[place]]

    def next(self) -> _Branch | None:
        """The branch at which the last choice that can still go another way does so."""
        for place in reversed(range(len(self.indices))):
            if self.indices[place] + 1 < self.numbers[place]:
                return _Branch([*self.indices[:place], self.indices[place] + 1])
        return None


def every(draw: Callable[[Choose], T]) -> Iterator[T]:
    """Every outcome of `draw`, once for each way in which its choices can go."""
    branch: _Branch | None = _Branch([])
    while branch is not None:
        yield draw(branch)
        branch = branch.next()


@dataclass(frozen=True)
class Mutation:
    """A genotype made from another by changing one factor of it."""

    factor: str
    genotype: Genotype


def change_factor(genotype: Genotype, rules: Rules, choose: Choose) -> Mutation:
    """Change one factor of a genotype.

    The factors are Nemotron-Flash's (a mixer of a block type, its ratio, its FFNs per mixer, how
    many blocks), the order of the blocks, and those of the whole model. A change of a block type
    concerns all its copies or a run of them, which then is a type of its own. The result may be the
    same, not canonical or outside the rules.
    """
    factor = choose(rules.factors)
    if factor in MODEL_FACTORS:
        options: dict[str, Sequence[Any]] = {
            "ffn": rules.ffns,
            "meta_tokens": rules.meta_tokens,
            "width": rules.widths,
        }
        others = [value for value in options[factor] if value != getattr(genotype, factor)]
        return Mutation(factor, replace(genotype, **{factor: choose(others)}))
    sequence = SEQUENCE_CHANGES[factor](genotype, rules, choose)
    return Mutation(factor, genotype.with_sequence(sequence))


def cross(first: Genotype, second: Genotype, choose: Choose) -> Genotype:
    """The first blocks of one parent and the last of the other; model factors from either.

    Each parent is cut at a place of its own, so the depth is free. The result may be the same, not
    canonical or outside the rules.
    """
    head = first.sequence[: choose(range(1, len(first.pattern) + 1))]
    tail = second.sequence[choose(range(len(second.pattern))) :]
    parents = (first, second)
    return Genotype.from_sequence(
        head + tail,
        ffn=choose(parents).ffn,
        meta_tokens=choose(parents).meta_tokens,
        width=choose(parents).width,
    )


def _change_type(
    change: Callable[[BlockType, Rules, Choose], BlockType],
) -> Callable[[Genotype, Rules, Choose], list[BlockType]]:
    """The change of all copies of a block type, or of a run of them."""

    def change_copies(genotype: Genotype, rules: Rules, choose: Choose) -> list[BlockType]:
        sequence = list(genotype.sequence)
        block = choose(genotype.blocks)
        places = [place for place, other in enumerate(sequence) if other == block]
        if choose(("all", "run")) == "run":
            start = choose(range(len(places)))
            places = places[start : choose(range(start + 1, len(places) + 1))]
        changed = change(block, rules, choose)
        for place in places:
            sequence[place] = changed
        return sequence

    return change_copies


def _change_operator(block: BlockType, rules: Rules, choose: Choose) -> BlockType:
    others = [mixer for mixer in rules.mixers if mixer not in block.mixers]
    if not others:
        return block
    mixers = list(block.mixers)
    mixers[choose(range(len(mixers)))] = choose(others)
    return replace(block, mixers=tuple(mixers))


def _change_ratio(block: BlockType, rules: Rules, choose: Choose) -> BlockType:
    ratio = choose([ratio for ratio in rules.ratios if ratio != block.ratio])
    mixers = list(block.mixers)
    if ratio == ALONE:
        mixers = [choose(mixers)]
    elif len(mixers) == 1:
        partner = choose([mixer for mixer in rules.mixers if mixer not in mixers])
        mixers.insert(choose(range(2)), partner)
    return replace(block, mixers=tuple(mixers), ratio=ratio)


def _change_ffns(block: BlockType, rules: Rules, choose: Choose) -> BlockType:
    counts = [count for count in rules.ffns_per_mixer if count != block.ffns_per_mixer]
    return replace(block, ffns_per_mixer=choose(counts))


def _change_count(genotype: Genotype, rules: Rules, choose: Choose) -> list[BlockType]:
    """Add a copy of a block type somewhere, or remove a block."""
    sequence = list(genotype.sequence)
    if choose(("add", "remove")) == "add":
        sequence.insert(choose(range(len(sequence) + 1)), choose(genotype.blocks))
    else:
        del sequence[choose(range(len(sequence)))]
    return sequence


def _swap(genotype: Genotype, rules: Rules, choose: Choose) -> list[BlockType]:
    """Exchange two blocks."""
    sequence = list(genotype.sequence)
    first, second = choose(range(len(sequence))), choose(range(len(sequence)))
    sequence[first], sequence[second] = sequence[second], sequence[first]
    return sequence


SEQUENCE_CHANGES: dict[str, Callable[[Genotype, Rules, Choose], list[BlockType]]] = {
    "operator": _change_type(_change_operator),
    "ratio": _change_type(_change_ratio),
    "ffns_per_mixer": _change_type(_change_ffns),
    "count": _change_count,
    "order": _swap,
}
