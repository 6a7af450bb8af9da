"""What the operator study compares, and how sizes are chosen so that it compares fairly.

Each operator stands in a block of its own and in a block with a partner, as in Nemotron-Flash (Fu
et al. 2025): one FFN after the mixer, none after those that do without (Mamba and Mamba2) when they
are alone, and mixer-mixer-FFN for a pair. Models are as many blocks as come nearest to the same
number of operators.

*Equal parameters*: the number of blocks is fixed. At each width the FFN's hidden width takes up
what is missing; of the widths that so come within 2 % of the count, the one whose FFN is nearest
to the given ratio is taken. If there is none, as without an FFN, one or two blocks more or fewer
may serve; if there still is none, the nearest is taken.

*Equal latency*: the model of equal parameters, if it is within the tolerance. Otherwise the width
is found by interpolating measured latencies, the FFN at the given ratio; blocks are added or
removed only if no width reaches the target. The nearest that was measured is taken.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from pydantic import Field

from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.operators import FFNConfig, OperatorConfig, parse_operator

PARAMETER_TOLERANCE = 0.02
# Blocks more or fewer that may serve to meet the parameter count.
MAX_EXTRA_BLOCKS = 2
# How far, as a factor, the FFN's ratio may be changed to meet the parameter count.
MAX_STRETCH = 2.0
# Numbers of blocks that are tried to meet a latency.
MAX_DEPTHS = 4

Positive = Annotated[int, Field(gt=0)]


@schema
class StudySpaceConfig:
    """Which operators are compared, and what else their models are made of.

    operators: the mixers, each 'name' or 'name(field=value,…)'. The first one, alone, is the
        reference: its latency is the target when none is given.
    partners: what each operator is paired with, 'all' for every other operator. A bare name stands
        for the first of `operators` of that name.
    ffn: after each mixer; its ratio is changed where parameters are to be equal.
    without_ffn: mixers that no FFN follows when they are alone. A bare name stands for every
        operator of that name.
    num_operators: of a whole model, FFNs included, as near as whole blocks come.
    min_width, max_width, width_step: widths that may be chosen.
    The rest is as in `Architecture`, the same for all models.
    """

    operators: tuple[str, ...]
    partners: str | tuple[str, ...]
    ffn: str
    without_ffn: tuple[str, ...]
    num_operators: Positive
    min_width: Positive
    max_width: Positive
    width_step: Positive
    meta_tokens: Annotated[int, Field(ge=0)] = 0
    tie_embeddings: bool = True
    normalize_logits: bool = False

    def __post_init__(self) -> None:
        problems = self._problems()
        if not problems:
            problems = [
                f"operators: no width of {self.widths} can take {arrangement.block_text(self)}"
                for arrangement in self.arrangements()
                if not self.available_widths(arrangement)
            ]
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        found = []
        if not self.operators:
            found.append("operators: must not be empty")
        if self.max_width < self.min_width:
            found.append(f"max_width: must be >= min_width {self.min_width}, got {self.max_width}")
        if isinstance(self.partners, str) and self.partners != "all":
            found.append(f"partners: must be 'all' or a list, got {self.partners!r}")
        partners = () if isinstance(self.partners, str) else self.partners
        lists = (
            *(("operators", self.operators), ("partners", partners)),
            *(("without_ffn", self.without_ffn), ("ffn", (self.ffn,))),
        )
        for name, text in [(name, text) for name, texts in lists for text in texts]:
            try:
                is_ffn = isinstance(parse_operator(text), FFNConfig)
            except ValueError as error:
                found.append(f"{name}: {error}")
                continue
            if is_ffn != (name == "ffn"):
                needs = "an ffn" if name == "ffn" else "mixers"
                found.append(f"{name}: must be {needs}, got {text!r}")
        return found

    @property
    def widths(self) -> list[int]:
        """Every width that may be chosen, narrowest first."""
        return list(range(self.min_width, self.max_width + 1, self.width_step))

    def available_widths(self, arrangement: Arrangement) -> list[int]:
        """The widths that all operators of a block can take."""
        block = arrangement.block(self)
        return [w for w in self.widths if not any(operator.problems(w) for operator in block)]

    def mixers(self) -> list[OperatorConfig]:
        """The operators, each once."""
        return list(dict.fromkeys(parse_operator(text) for text in self.operators))

    def arrangements(self) -> list[Arrangement]:
        """Every operator alone, then every pair once."""
        mixers = self.mixers()
        if isinstance(self.partners, str):
            pairs = list(itertools.combinations(mixers, 2))
        else:
            partners = [self._partner(text, mixers) for text in self.partners]
            pairs = list(itertools.product(mixers, partners))
        different: dict[frozenset[OperatorConfig], tuple[OperatorConfig, OperatorConfig]] = {}
        for pair in pairs:
            if pair[0] != pair[1]:
                different.setdefault(frozenset(pair), pair)
        alone = [Arrangement((mixer,)) for mixer in mixers]
        return alone + [Arrangement(pair) for pair in different.values()]

    @staticmethod
    def _partner(text: str, mixers: list[OperatorConfig]) -> OperatorConfig:
        namesakes = [mixer for mixer in mixers if mixer.name == text.strip()]
        return namesakes[0] if namesakes else parse_operator(text)

    def needs_ffn(self, mixer: OperatorConfig) -> bool:
        """Whether an FFN follows the mixer when it is alone."""
        return not any(
            mixer.name == text.strip() or mixer == parse_operator(text) for text in self.without_ffn
        )

    def labels(self) -> dict[OperatorConfig, str]:
        """A short name of every mixer: its text without what all of the same name share."""
        fields: dict[str, dict[OperatorConfig, list[str]]] = defaultdict(dict)
        for mixer in {mixer: None for a in self.arrangements() for mixer in a.mixers}:
            _, _, text = str(mixer).rstrip(")").partition("(")
            fields[mixer.name][mixer] = text.split(",") if text else []
        labels = {}
        for name, given in fields.items():
            shared = set.intersection(*map(set, given.values()))
            for mixer, arguments in given.items():
                own = [argument for argument in arguments if argument not in shared]
                labels[mixer] = f"{name}({','.join(own)})" if own else name
        return labels


@dataclass(frozen=True)
class Arrangement:
    """One mixer alone, or two in a hybrid block."""

    mixers: tuple[OperatorConfig, ...]

    def block(self, space: StudySpaceConfig) -> tuple[OperatorConfig, ...]:
        """The operators of a block."""
        if len(self.mixers) == 1 and not space.needs_ffn(self.mixers[0]):
            return self.mixers
        return (*self.mixers, parse_operator(space.ffn))

    def block_text(self, space: StudySpaceConfig) -> str:
        """The block, as canonical text."""
        return " ".join(map(str, self.block(space)))

    def num_blocks(self, space: StudySpaceConfig) -> int:
        """How many blocks come nearest to the number of operators of a model."""
        return max(1, round(space.num_operators / len(self.block(space))))

    def realize(
        self, space: StudySpaceConfig, num_blocks: int, width: int, vocab_size: int
    ) -> Architecture:
        """So many blocks at a width, the FFN at its given ratio."""
        return Architecture(
            width=width,
            vocab_size=vocab_size,
            operators=self.block(space) * num_blocks,
            meta_tokens=space.meta_tokens,
            tie_embeddings=space.tie_embeddings,
            normalize_logits=space.normalize_logits,
        )

    def count_blocks(self, space: StudySpaceConfig, architecture: Architecture) -> int:
        """How many blocks an architecture of this arrangement has."""
        return len(architecture.operators) // len(self.block(space))


def match_parameters(
    arrangement: Arrangement, space: StudySpaceConfig, vocab_size: int, target: int
) -> Architecture:
    """The architecture of an arrangement with as near as can be `target` parameters."""
    nominal = arrangement.num_blocks(space)
    found: list[_Sized] = []
    for extra in range(MAX_EXTRA_BLOCKS + 1):
        for num_blocks in sorted({nominal - extra, nominal + extra} - {0, -1}):
            found += _sized(arrangement, space, num_blocks, vocab_size, target)
        near = [sized for sized in found if sized.deviation <= PARAMETER_TOLERANCE]
        if near:
            return min(near, key=lambda sized: (sized.stretch, sized.deviation)).architecture
    return min(found, key=lambda sized: sized.deviation).architecture


@dataclass(frozen=True)
class _Sized:
    """A size of an arrangement.

    deviation: of its parameters from the target, as a share. stretch: |log| of the factor by which
    the FFN's hidden width was changed.
    """

    architecture: Architecture
    deviation: float
    stretch: float


def _sized(
    arrangement: Arrangement, space: StudySpaceConfig, num_blocks: int, vocab_size: int, target: int
) -> Iterator[_Sized]:
    """One size per width, the FFN made to fit."""
    for width in space.available_widths(arrangement):
        plain = arrangement.realize(space, num_blocks, width, vocab_size)
        fitted = _fit_ffn(plain, target)
        hidden, before = (
            next((op.hidden(width) for op in model.operators if isinstance(op, FFNConfig)), 1)
            for model in (fitted, plain)
        )
        deviation = abs(fitted.parameters() / target - 1)
        yield _Sized(fitted, deviation, abs(math.log(hidden / before)))


def _fit_ffn(architecture: Architecture, target: int) -> Architecture:
    """The architecture with its FFNs' hidden width changed so that parameters come near target."""
    width = architecture.width
    ffns = [operator for operator in architecture.operators if isinstance(operator, FFNConfig)]
    if not ffns:
        return architecture
    ffn, step = ffns[0], ffns[0].multiple_of
    hidden = ffn.hidden(width)
    step_parameters = _with_hidden(ffn, width, hidden + step).parameters(width)
    step_parameters -= ffn.parameters(width)
    num_steps = round((target - architecture.parameters()) / (len(ffns) * step_parameters))
    least, most = (round(hidden * factor / step) for factor in (1 / MAX_STRETCH, MAX_STRETCH))
    fitted = step * min(max(hidden // step + num_steps, least, 1), most)
    if fitted == hidden:
        return architecture
    changed = _with_hidden(ffn, width, fitted)
    operators = (changed if operator == ffn else operator for operator in architecture.operators)
    return replace(architecture, operators=tuple(operators))


def _with_hidden(ffn: FFNConfig, width: int, hidden: int) -> FFNConfig:
    """The FFN with another hidden width."""
    # Half a step above, so that rounding down to whole steps gives what is wanted.
    changed = replace(ffn, ratio=round((hidden + ffn.multiple_of / 2) / width, 5))
    assert changed.hidden(width) == hidden, (ffn, width, hidden)
    return changed


def match_latency(
    arrangement: Arrangement,
    space: StudySpaceConfig,
    start: Architecture,
    measure_ms: Callable[[Architecture], float],
    target_ms: float,
    tolerance: float,
) -> Architecture:
    """The architecture of an arrangement whose measured latency is as near as can be the target.

    start: that of equal parameters. measure_ms: measures, or repeats what it measured before.
    """
    measured: dict[Architecture, float] = {}
    widths = space.available_widths(arrangement)
    start_blocks = arrangement.count_blocks(space, start)

    def measure(num_blocks: int, width: int) -> float:
        is_start = (num_blocks, width) == (start_blocks, start.width)
        model = start if is_start else arrangement.realize(space, num_blocks, width, vocab_size)
        measured[model] = measure_ms(model)
        return measured[model]

    def is_met() -> bool:
        return min(abs(ms / target_ms - 1) for ms in measured.values()) <= tolerance

    vocab_size, num_blocks = start.vocab_size, start_blocks
    tried: list[int] = []
    while len(tried) < MAX_DEPTHS and num_blocks > 0 and num_blocks not in tried:
        tried.append(num_blocks)
        ms = measure(num_blocks, start.width)
        if is_met():
            break
        end = widths[0] if ms > target_ms else widths[-1]
        end_ms = measure(num_blocks, end)
        if min(ms, end_ms) <= target_ms <= max(ms, end_ms):
            low, high = sorted([(start.width, ms), (end, end_ms)])
            _search_width(partial(measure, num_blocks), widths, low, high, target_ms, is_met)
            break
        proportional = num_blocks * target_ms / end_ms
        if end_ms > target_ms:
            num_blocks = min(num_blocks - 1, math.floor(proportional))
        else:
            num_blocks = max(num_blocks + 1, math.ceil(proportional))
    return min(measured, key=lambda model: abs(measured[model] - target_ms))


def _search_width(
    measure: Callable[[int], float],
    widths: list[int],
    low: tuple[int, float],
    high: tuple[int, float],
    target_ms: float,
    is_met: Callable[[], bool],
) -> None:
    """Measure between two (width, ms) that enclose the target, until it is met or none is left."""
    while not is_met():
        between = [width for width in widths if low[0] < width < high[0]]
        if not between:
            return
        share = (target_ms - low[1]) / (high[1] - low[1])
        guess = low[0] + share * (high[0] - low[0])
        width = min(between, key=lambda width: abs(width - guess))
        ms = measure(width)
        if ms <= target_ms:
            low = (width, ms)
        else:
            high = (width, ms)
