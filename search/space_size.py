"""How many genotypes a space has, between two numbers that take no enumeration.

Different sequences of blocks can be the same operators. All sequences together are therefore the
upper bound. Those whose blocks all have the same number of mixers can be told apart, since their
operators fall into blocks in one way only: they are the lower bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from search.constraints import Structure
from search.genotype import BlockType, Rules


def size_bounds(
    rules: Rules, structure: Structure, widths_of: Mapping[str, Collection[int]]
) -> tuple[int, int]:
    """Numbers between which the size of a space lies, both included.

    widths_of: the widths of the space that each operator can take.
    """
    available = [
        {operator for operator, widths in widths_of.items() if width in widths}
        for width in sorted(set().union(*widths_of.values()))
    ]
    lows = [_distinct(rules, structure, operators) for operators in available]
    if rules.widths == (None,):
        # A genotype of any one width is one of the space; its operators need one in common.
        low, high = max(lows), _spelled(rules.block_types, rules, structure, set(widths_of))
    else:
        low = sum(lows)
        high = sum(_spelled(rules.block_types, rules, structure, each) for each in available)
    return low * len(rules.meta_tokens), high * len(rules.meta_tokens)


def _distinct(rules: Rules, structure: Structure, operators: set[str]) -> int:
    """Sequences of `operators` that are certainly different ones."""
    by_mixers: dict[int, list[BlockType]] = {}
    for block in rules.block_types:
        by_mixers.setdefault(block.num_mixers, []).append(block)
    return max(_spelled(blocks, rules, structure, operators) for blocks in by_mixers.values())


def _spelled(
    blocks: Iterable[BlockType], rules: Rules, structure: Structure, operators: set[str]
) -> int:
    """Sequences of `blocks` of `operators`, with each kind of FFN where there is any."""
    usable = [block for block in blocks if operators.issuperset(block.mixers)]
    bare = [block for block in usable if not block.ffns_per_mixer]
    without_ffn = _count(bare, rules.ffns[0], rules, structure)
    return without_ffn + sum(
        _count(usable, ffn, rules, structure) - without_ffn
        for ffn in rules.ffns
        if ffn in operators
    )


@dataclass(frozen=True)
class _Kind:
    """What matters of a block type for counting.

    met: the required operators that it has.
    """

    num_operators: int
    num_full_attention: int
    met: frozenset[str]


def _count(blocks: Iterable[BlockType], ffn: str, rules: Rules, structure: Structure) -> int:
    """Sequences of `blocks`, with this FFN, that keep to the rules and meet the constraints."""
    kinds = Counter(_kind(block.operators(ffn), structure) for block in blocks)
    least = structure.min_full_attention
    # Sequences of so many blocks, by their operators, their full attention as far as it matters,
    # what is met, and how many different types of each kind they have.
    Totals = tuple[int, int, frozenset[str], tuple[int, ...]]
    sequences: Counter[Totals] = Counter({(0, 0, frozenset(), (0,) * len(kinds)): 1})
    total = 0
    for _ in range(rules.max_blocks):
        longer: Counter[Totals] = Counter()
        for (num_operators, num_full, met, types), number in sequences.items():
            for place, (kind, num_types) in enumerate(kinds.items()):
                if num_operators + kind.num_operators > rules.max_operators:
                    continue
                totals = (
                    num_operators + kind.num_operators,
                    min(num_full + kind.num_full_attention, least),
                    met | kind.met,
                )
                if types[place]:
                    longer[*totals, types] += number * types[place]
                if types[place] < num_types and sum(types) < rules.max_block_types:
                    more = (*types[:place], types[place] + 1, *types[place + 1 :])
                    longer[*totals, more] += number * (num_types - types[place])
        total += sum(
            number
            for (_, num_full, met, _), number in longer.items()
            if num_full == least and len(met) == len(structure.required)
        )
        sequences = longer
    return total


def _kind(operators: tuple[str, ...], structure: Structure) -> _Kind:
    return _Kind(len(operators), structure.num_full_attention(operators), structure.met(operators))
