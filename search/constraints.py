"""What a candidate must be besides fast enough: how large, and of which operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.operators import AttentionConfig, OperatorConfig, parse_operator

Positive = Annotated[int, Field(gt=0)]


@schema
class ConstraintsConfig:
    """Limits of a search besides its latency target; none by default.

    max_parameters: of the whole model, its embedding included.
    max_state_bytes: of one sequence after `state_context_tokens` and the meta tokens, four bytes a
        value.
    min_full_attention: operators that are attention without a window.
    required: what a model must have at least once; banned: what it must not have. A bare name
        stands for every operator of that name, else it is written as in the space.
    """

    max_parameters: Positive | None = None
    max_state_bytes: Positive | None = None
    state_context_tokens: Positive | None = None
    min_full_attention: Positive | None = None
    required: tuple[str, ...] = ()
    banned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pair = {
            "max_state_bytes": self.max_state_bytes,
            "state_context_tokens": self.state_context_tokens,
        }
        missing = [name for name, value in pair.items() if value is None]
        if len(missing) == 1:
            (given,) = pair.keys() - missing
            raise ConfigError([f"{missing[0]}: must be given with {given}, got null"])

    def __str__(self) -> str:
        """Those that are set: 'min_full_attention=2, banned=[mamba]'."""
        texts = {
            "max_parameters": self.max_parameters,
            "max_state_bytes": self.max_state_bytes,
            "state_context_tokens": self.state_context_tokens,
            "min_full_attention": self.min_full_attention,
            "required": f"[{', '.join(self.required)}]" if self.required else None,
            "banned": f"[{', '.join(self.banned)}]" if self.banned else None,
        }
        return ", ".join(f"{name}={text}" for name, text in texts.items() if text is not None)

    def problems(
        self, mixers: Sequence[OperatorConfig], ffns: Sequence[OperatorConfig], max_operators: int
    ) -> list[str]:
        """Why no model of these operators can meet the constraints, as far as it can be told."""
        found = []
        for name in ("required", "banned"):
            for text in getattr(self, name):
                try:
                    if not _named(text, [*mixers, *ffns]):
                        found.append(f"{name}: {text!r} is not among mixers and ffns")
                except ValueError as error:
                    found.append(f"{name}: {error}")
        if found:
            return found
        left_mixers, left_ffns = self.allowed(mixers), self.allowed(ffns)
        for name, left in (("mixers", left_mixers), ("ffns", left_ffns)):
            if not left:
                found.append(f"banned: leaves none of {name}, got {list(self.banned)}")
        found += [
            f"required: {text!r} is banned"
            for text in self.required
            if not _named(text, [*left_mixers, *left_ffns])
        ]
        if self.min_full_attention is not None:
            if not any(map(_is_full_attention, left_mixers)):
                found.append(
                    "min_full_attention: no mixer is attention without a window, "
                    f"got {self.min_full_attention}"
                )
            if self.min_full_attention > max_operators:
                found.append(
                    f"min_full_attention: must be <= max_operators {max_operators}, "
                    f"got {self.min_full_attention}"
                )
        return found

    def allowed(self, operators: Sequence[OperatorConfig]) -> list[OperatorConfig]:
        """Those that are not banned."""
        banned = [operator for text in self.banned for operator in _named(text, operators)]
        return [operator for operator in operators if operator not in banned]

    def structure(self, operators: Sequence[OperatorConfig]) -> Structure:
        """The constraints on a sequence of `operators`."""
        return Structure(
            full_attention=frozenset(map(str, filter(_is_full_attention, operators))),
            min_full_attention=self.min_full_attention or 0,
            required={text: frozenset(map(str, _named(text, operators))) for text in self.required},
        )

    def size_problems(self, architecture: Architecture) -> list[str]:
        """Which limits of size an architecture misses; empty when it keeps them all."""
        found = []
        parameters = architecture.parameters()
        if self.max_parameters is not None and parameters > self.max_parameters:
            found.append(f"max_parameters: must be <= {self.max_parameters}, got {parameters}")
        if self.max_state_bytes is not None and self.state_context_tokens is not None:
            state_bytes = architecture.state_bytes(
                architecture.meta_tokens + self.state_context_tokens
            )
            if state_bytes > self.max_state_bytes:
                found.append(
                    f"max_state_bytes: must be <= {self.max_state_bytes} "
                    f"at {self.state_context_tokens} tokens, got {state_bytes}"
                )
        return found


@dataclass(frozen=True)
class Structure:
    """Constraints on a sequence of operators, each as canonical text.

    full_attention: the operators of which there have to be `min_full_attention`.
    required: the operators of which there has to be one, by what was asked for.
    """

    full_attention: frozenset[str]
    min_full_attention: int
    required: Mapping[str, frozenset[str]]

    def num_full_attention(self, operators: Sequence[str]) -> int:
        """How many of the operators are full attention."""
        return sum(operator in self.full_attention for operator in operators)

    def met(self, operators: Sequence[str]) -> frozenset[str]:
        """What of `required` is among the operators."""
        return frozenset(
            text for text, group in self.required.items() if not group.isdisjoint(operators)
        )

    def problems(self, operators: Sequence[str]) -> list[str]:
        """Which constraints a model of these operators misses; empty when it meets them all."""
        found = []
        number = self.num_full_attention(operators)
        if number < self.min_full_attention:
            found.append(f"min_full_attention: must be >= {self.min_full_attention}, got {number}")
        met = self.met(operators)
        found += [f"required: {text!r} is missing" for text in self.required if text not in met]
        return found


def _named(text: str, operators: Sequence[OperatorConfig]) -> list[OperatorConfig]:
    """The operators that a bare name or a full spelling stands for.

    Raises ValueError if the text is no operator at all.
    """
    named = [operator for operator in operators if operator.name == text.strip()]
    return named or [operator for operator in operators if operator == parse_operator(text)]


def _is_full_attention(operator: OperatorConfig) -> bool:
    return isinstance(operator, AttentionConfig) and operator.window is None
