"""At which contexts a latency table times an operator, and how these make up a request.

A request is a prompt and the decoding steps after it. What the prompt takes holds for its length;
the first step belongs to it, for it finds in the caches what the prompt left there and takes two or
three times as long as the others. Steps differ by the tokens that they see; attention's cost grows
with them, by whole blocks of places, along a straight line but for what caches do. So steps are
timed in blocks whose numbers double, and interpolated between: the steps of any request are an
integral over a few rows, which other requests share.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from latency.request import BURST_STEPS
from latency.workload import Workload
from slm.operators import OperatorConfig
from slm.operators.attention import PLACES_BLOCK

# The first token, which the prompt gives, and that of the first step.
PROMPT_NEW_TOKENS = 2


@dataclass(frozen=True, order=True)
class Part:
    """What of a request a row of the table holds.

    kind: 'prompt', the time to `PROMPT_NEW_TOKENS` tokens, or 'context', one step after them.
    tokens: of the prompt; or seen by the step, meta tokens included: up to so many, rounded up to
        whole blocks of places.
    """

    kind: Literal["prompt", "context"]
    tokens: int

    def __str__(self) -> str:
        """'prompt 64', 'context 128'."""
        return f"{self.kind} {self.tokens}"

    @property
    def burst(self) -> int:
        """How many of it are timed together."""
        return 1 if self.kind == "prompt" else BURST_STEPS

    def steps(self, meta_tokens: int) -> tuple[int, int]:
        """Of a context: between how many tokens read, meta tokens not counted, its steps are timed.

        They begin where a burst in the middle of the block does, or after the meta tokens.
        """
        middle = self.tokens - (PLACES_BLOCK + BURST_STEPS) // 2
        return max(middle - meta_tokens, 0), self.tokens - meta_tokens


def contexts(most: int, meta_tokens: int) -> list[Part]:
    """The contexts of the grid, ascending, up to the first that is not below `most` tokens.

    The first is the least in which a burst of steps, and one before it, has room after the meta
    tokens; the others are the powers of two blocks above.
    """
    blocks = [-(-(meta_tokens + BURST_STEPS + 1) // PLACES_BLOCK)]
    while blocks[-1] * PLACES_BLOCK < most:
        blocks.append(2 ** blocks[-1].bit_length())
    return [Part("context", block * PLACES_BLOCK) for block in blocks]


def parts(workload: Workload, meta_tokens: int) -> dict[Part, float]:
    """What a request consists of: each part with how many times it is taken.

    A step between two contexts counts for both, in proportion to how near it is.
    """
    first = meta_tokens + workload.prompt_tokens + PROMPT_NEW_TOKENS
    last = meta_tokens + workload.prompt_tokens + workload.new_tokens - 1
    grid = contexts(last, meta_tokens)
    found = defaultdict(float, {Part("prompt", workload.prompt_tokens): 1.0})
    seen = Counter(-(-tokens // PLACES_BLOCK) * PLACES_BLOCK for tokens in range(first, last + 1))
    for tokens, steps in seen.items():
        above = next(number for number, part in enumerate(grid) if tokens <= part.tokens)
        low, high = grid[max(above - 1, 0)], grid[above]
        share = (tokens - low.tokens) / (high.tokens - low.tokens) if high > low else 1.0
        found[high] += steps * share
        if share < 1.0:
            found[low] += steps * (1.0 - share)
    return dict(found)


def representative(operator: OperatorConfig, width: int, part: Part, meta_tokens: int) -> Part:
    """The first context of the grid whose steps cost an operator the same as those of `part`.

    A recurrent operator's cost is that of the first; attention's within a window stops growing.
    """
    if part.kind == "prompt":
        return part

    def cost(each: Part) -> tuple[float, int]:
        # Of meta tokens a window may keep all or none: what it sees grows no later than this.
        seen = max(each.steps(meta_tokens)[0], 1)
        return operator.flops_per_token(width, seen), operator.state_bytes(width, seen, 1)

    return next(each for each in contexts(part.tokens, meta_tokens) if cost(each) == cost(part))


def operator_parts(
    operator: OperatorConfig, width: int, workload: Workload, meta_tokens: int
) -> dict[Part, float]:
    """`parts` for one operator: contexts that cost it the same are taken together."""
    found: defaultdict[Part, float] = defaultdict(float)
    for part, times in parts(workload, meta_tokens).items():
        found[representative(operator, width, part, meta_tokens)] += times
    return dict(found)


def most_tokens(chosen: Iterable[Part], meta_tokens: int) -> int:
    """Tokens, meta tokens not counted, that a request has to have room for to time the parts."""
    return max(
        part.tokens + 1 if part.kind == "prompt" else part.tokens - meta_tokens for part in chosen
    )
