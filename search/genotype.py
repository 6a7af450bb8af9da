"""The genotype of a hybrid: a few block types, the order in which their copies follow, and what
the whole model has one of: its kind of FFN, its meta tokens and, where it is chosen, its width.

Nemotron-Flash (arXiv 2511.18890) repeats one block type per stage. Its released
models interleave block types instead, so the order is free here: stages, round robin and anything
between are patterns. Operators are written as in configs: 'attention(head_dim=32)'.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

Ratio = tuple[int, int]
ALONE: Ratio = (0, 1)


@dataclass(frozen=True, order=True)
class BlockType:
    """One or two mixers, how many of each, and the FFNs after every one of them.

    mixers: one mixer with ratio 0:1, else two different ones.
    ratio: copies of the first and of the second mixer, in that order.
    ffns_per_mixer: FFNs that follow each mixer.
    """

    mixers: tuple[str, ...]
    ratio: Ratio = ALONE
    ffns_per_mixer: int = 1

    def __post_init__(self) -> None:
        expected = 1 if self.ratio == ALONE else 2
        if len(self.mixers) != expected or len(set(self.mixers)) != expected:
            raise ValueError(
                f"block type: ratio {format_ratio(self.ratio)} needs {expected} different "
                f"mixers, got {self.mixers}"
            )

    @property
    def num_mixers(self) -> int:
        """Mixers of the block, copies counted."""
        return sum(self.ratio)

    @property
    def num_operators(self) -> int:
        """Mixers and FFNs of the block."""
        return self.num_mixers * (1 + self.ffns_per_mixer)

    def operators(self, ffn: str) -> tuple[str, ...]:
        """The block's operators in order."""
        ffns = (ffn,) * self.ffns_per_mixer
        first, second = self.ratio
        return (self.mixers[0], *ffns) * first + (self.mixers[-1], *ffns) * second


@dataclass(frozen=True)
class Genotype:
    """Block types and their order, and the factors of the whole model.

    blocks: the different block types, in the order in which they first appear.
    pattern: the index of each block's type, first to last.
    ffn: the one kind of FFN.
    meta_tokens: learned vectors before every document.
    width: size of the residual stream; None: it follows from the latency target.
    """

    blocks: tuple[BlockType, ...]
    pattern: tuple[int, ...]
    ffn: str
    meta_tokens: int = 0
    width: int | None = None

    @classmethod
    def from_sequence(
        cls,
        sequence: Sequence[BlockType],
        ffn: str,
        meta_tokens: int = 0,
        width: int | None = None,
    ) -> Genotype:
        """The genotype whose blocks are `sequence`, first to last."""
        blocks = tuple(dict.fromkeys(sequence))
        pattern = tuple(blocks.index(block) for block in sequence)
        return cls(blocks, pattern, ffn, meta_tokens, width)

    def with_sequence(self, sequence: Sequence[BlockType]) -> Genotype:
        """The genotype with other blocks."""
        return Genotype.from_sequence(sequence, self.ffn, self.meta_tokens, self.width)

    @cached_property
    def sequence(self) -> tuple[BlockType, ...]:
        """The type of every block, first to last."""
        return tuple(self.blocks[index] for index in self.pattern)

    @cached_property
    def operators(self) -> tuple[str, ...]:
        """All operators, first to last."""
        parts = [block.operators(self.ffn) for block in self.blocks]
        return tuple(itertools.chain.from_iterable(parts[index] for index in self.pattern))

    def phenotype(self) -> tuple[tuple[str, ...], int, int | None]:
        """Operators, meta tokens and width: equal for all genotypes of one architecture."""
        return self.operators, self.meta_tokens, self.width

    def letters(self) -> str:
        """The pattern in letters: 'ABABAA'."""
        return "".join(string.ascii_uppercase[index] for index in self.pattern)

    def to_json(self) -> dict[str, Any]:
        """A plain value that `from_json` reads back."""
        blocks = [
            {
                "mixers": list(block.mixers),
                "ratio": format_ratio(block.ratio),
                "ffns_per_mixer": block.ffns_per_mixer,
            }
            for block in self.blocks
        ]
        return {
            "blocks": blocks,
            "pattern": self.letters(),
            "ffn": self.ffn,
            "meta_tokens": self.meta_tokens,
            "width": self.width,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Genotype:
        """The genotype that `to_json` wrote."""
        blocks = tuple(
            BlockType(tuple(block["mixers"]), parse_ratio(block["ratio"]), block["ffns_per_mixer"])
            for block in value["blocks"]
        )
        pattern = tuple(string.ascii_uppercase.index(letter) for letter in value["pattern"])
        return cls(blocks, pattern, value["ffn"], value["meta_tokens"], value["width"])


@dataclass(frozen=True)
class Rules:
    """What each factor of a genotype may be.

    ratios: those that there are mixers enough for.
    widths: (None,) where the width follows from the latency target.
    """

    mixers: tuple[str, ...]
    ratios: tuple[Ratio, ...]
    ffns_per_mixer: tuple[int, ...]
    ffns: tuple[str, ...]
    meta_tokens: tuple[int, ...]
    widths: tuple[int | None, ...]
    max_block_types: int
    max_blocks: int
    max_operators: int

    def allow(self, genotype: Genotype) -> bool:
        """Whether the genotype follows the rules."""
        return (
            0 < len(genotype.pattern) <= self.max_blocks
            and len(genotype.blocks) <= self.max_block_types
            and len(genotype.operators) <= self.max_operators
            and all(self.allow_block(block) for block in genotype.blocks)
            and genotype.ffn in self.ffns
            and genotype.meta_tokens in self.meta_tokens
            and genotype.width in self.widths
        )

    def allow_block(self, block: BlockType) -> bool:
        """Whether the block type follows the rules."""
        return (
            all(mixer in self.mixers for mixer in block.mixers)
            and block.ratio in self.ratios
            and block.ffns_per_mixer in self.ffns_per_mixer
        )

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The factors that there is a choice of."""
        choices = {
            "operator": len(self.mixers),
            "ratio": len(self.ratios),
            "ffns_per_mixer": len(self.ffns_per_mixer),
            "count": self.max_blocks,
            "order": min(self.max_blocks, self.max_block_types),
            "ffn": len(self.ffns),
            "meta_tokens": len(self.meta_tokens),
            "width": len(self.widths),
        }
        return tuple(factor for factor, number in choices.items() if number > 1)

    @cached_property
    def block_types(self) -> tuple[BlockType, ...]:
        """Every block type that the rules allow."""
        return tuple(
            BlockType(mixers, ratio, ffns)
            for ratio in self.ratios
            for mixers in itertools.permutations(self.mixers, 1 if ratio == ALONE else 2)
            for ffns in self.ffns_per_mixer
        )

    def sequences(
        self, length: int, start: tuple[BlockType, ...] = ()
    ) -> Iterator[tuple[BlockType, ...]]:
        """Every sequence of `length` blocks that the rules allow and that begins with `start`."""
        if len(start) == length:
            yield start
            return
        for block in self.block_types:
            sequence = (*start, block)
            if (
                len(set(sequence)) <= self.max_block_types
                and sum(block.num_operators for block in sequence) <= self.max_operators
            ):
                yield from self.sequences(length, sequence)


def decompose(operators: Sequence[str], ffn: str, rules: Rules) -> tuple[BlockType, ...] | None:
    """The one canonical sequence of blocks that makes up `operators`; None if the rules allow none.

    Different sequences of blocks can stand for the same operators. The canonical one has the fewest
    block types and, among those, the fewest blocks.
    """
    units = _units(operators, ffn)
    if units is None or len(operators) > rules.max_operators:
        return None
    blocks_at = [tuple(_blocks_at(units, start, rules)) for start in range(len(units))]
    for max_types in range(1, rules.max_block_types + 1):
        sequence = _fewest_blocks(blocks_at, max_types)
        if sequence is not None and len(sequence) <= rules.max_blocks:
            return sequence
    return None


# A mixer and the number of FFNs that follow it.
Unit = tuple[str, int]


def _units(operators: Sequence[str], ffn: str) -> tuple[Unit, ...] | None:
    """The mixers, each with its FFNs; None if an FFN comes first."""
    units: list[Unit] = []
    for operator in operators:
        if operator != ffn:
            units.append((operator, 0))
        elif units:
            units[-1] = (units[-1][0], units[-1][1] + 1)
        else:
            return None
    return tuple(units) or None


def _fewest_blocks(
    blocks_at: Sequence[tuple[BlockType, ...]], max_types: int
) -> tuple[BlockType, ...] | None:
    """The shortest sequence of at most `max_types` block types that makes up all units.

    blocks_at: by unit, the block types that could begin there.
    """

    @cache
    def best(start: int, types: frozenset[BlockType]) -> tuple[BlockType, ...] | None:
        if start == len(blocks_at):
            return ()
        found: tuple[BlockType, ...] | None = None
        for block in blocks_at[start]:
            if block not in types and len(types) == max_types:
                continue
            rest = best(start + block.num_mixers, types | {block})
            if rest is not None and (found is None or len(rest) + 1 < len(found)):
                found = (block, *rest)
        return found

    return best(0, frozenset())


def _blocks_at(units: tuple[Unit, ...], start: int, rules: Rules) -> Iterator[BlockType]:
    """Every allowed block type that `units` could begin with at `start`."""
    for first, second in rules.ratios:
        part = units[start : start + first + second]
        if len(part) < first + second:
            continue
        if any(unit != part[0] for unit in part[:first]):
            continue
        if any(unit != part[-1] for unit in part[first:]) or part[0][1] != part[-1][1]:
            continue
        mixers = (part[0][0], part[-1][0]) if first else (part[0][0],)
        if len(set(mixers)) == len(mixers):
            block = BlockType(mixers, (first, second), part[0][1])
            if rules.allow_block(block):
                yield block


def short_form(genotype: Genotype, legend: Mapping[str, str]) -> str:
    """The genotype in a few letters: '2×[D F M2 F] [A F]'.

    legend: the short name of every operator.
    """
    parts = []
    for block, copies in itertools.groupby(genotype.sequence):
        count = len(list(copies))
        names = " ".join(legend[operator] for operator in block.operators(genotype.ffn))
        parts.append(f"{count}×[{names}]" if count > 1 else f"[{names}]")
    return " ".join(parts)


def parse_ratio(text: str) -> Ratio:
    """'1:3' as (1, 3). Raises ValueError."""
    first, colon, second = text.partition(":")
    if not (colon and first.isdigit() and second.isdigit() and int(second) > 0):
        raise ValueError(f"a ratio is two numbers such as '1:2', got {text!r}")
    ratio = (int(first), int(second))
    if ratio[0] == 0 and ratio != ALONE:
        raise ValueError(f"a single mixer has the ratio '0:1', got {text!r}")
    return ratio


def format_ratio(ratio: Ratio) -> str:
    """(1, 3) as '1:3'."""
    return f"{ratio[0]}:{ratio[1]}"
