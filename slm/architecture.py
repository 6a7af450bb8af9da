"""The architecture of a model: all that decides shapes, as one hashable value with one text form.

The text is the key of latency tables, candidates, files and exports:

    width=128 vocab_size=4096 meta_tokens=8 | attention(head_dim=32) ffn deltanet ffn(ratio=2.0)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from slm.operators import OperatorConfig, parse_operator


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only language model.

    width: size of the residual stream.
    vocab_size: rows of the embedding.
    operators: the residual layers, first to last.
    meta_tokens: learned vectors that every document starts after.
    tie_embeddings: the head is the embedding.
    normalize_logits: each logit is divided by the norm of its row of the head, as in the
        released Nemotron-Flash models.
    norm_eps: epsilon of the RMSNorms before the operators and the head.

    Raises ValueError, with every problem in it, if the model cannot be built.
    """

    width: int
    vocab_size: int
    operators: tuple[OperatorConfig, ...]
    meta_tokens: int = 0
    tie_embeddings: bool = True
    normalize_logits: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Why the model cannot be built; empty when it can."""
        found = [
            f"{field}: must be >= {least}, got {value}"
            for field, value, least in (
                ("width", self.width, 1),
                ("vocab_size", self.vocab_size, 1),
                ("meta_tokens", self.meta_tokens, 0),
            )
            if value < least
        ]
        if not self.norm_eps > 0:
            found.append(f"norm_eps: must be > 0, got {self.norm_eps}")
        if not self.operators:
            found.append("operators: must not be empty")
        if self.width >= 1:
            for operator in dict.fromkeys(self.operators):
                found.extend(operator.problems(self.width))
        return found

    def __str__(self) -> str:
        """The canonical text; `parse` reads it back."""
        required = [f"width={self.width}", f"vocab_size={self.vocab_size}"]
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)[3:]
            if getattr(self, field.name) != field.default
        ]
        return f"{' '.join(required + changed)} | {' '.join(map(str, self.operators))}"

    @classmethod
    def parse(cls, text: str) -> Architecture:
        """The architecture that a canonical text stands for.

        Raises ValueError naming the field and the value that are wrong.
        """
        head, bar, tail = text.partition("|")
        if not bar:
            raise ValueError(f"architecture {text!r}: expected 'width=… vocab_size=… | operators'")
        readers: dict[str, Any] = {
            "width": int,
            "vocab_size": int,
            "meta_tokens": int,
            "tie_embeddings": _read_bool,
            "normalize_logits": _read_bool,
            "norm_eps": float,
        }
        values: dict[str, Any] = {}
        for item in head.split():
            key, _, value = item.partition("=")
            if key not in readers:
                raise ValueError(
                    f"architecture: unknown field {key!r}; known: {', '.join(readers)}"
                )
            try:
                values[key] = readers[key](value)
            except ValueError:
                raise ValueError(f"architecture.{key}: cannot read {value!r}") from None
        for key in ("width", "vocab_size"):
            if key not in values:
                raise ValueError(f"architecture.{key}: missing in {text!r}")
        operators = tuple(parse_operator(item) for item in tail.split())
        return cls(operators=operators, **values)

    @property
    def digest(self) -> str:
        """12 hexadecimal digits that name the architecture's files."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:12]

    def parameters(self) -> int:
        """Exact number of parameters; a tied embedding counts once."""
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        layers = sum(self.width + operator.parameters(self.width) for operator in self.operators)
        return embeddings + self.meta_tokens * self.width + layers + self.width

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs of one token that sees `context` tokens, itself and meta tokens included.

        Counts matrix products, convolutions and the mixers' cores; not norms, activations and
        the embedding's look-up.
        """
        mixers = sum(op.flops_per_token(self.width, context) for op in self.operators)
        return self.head_flops_per_token() + mixers

    def head_flops_per_token(self) -> float:
        """Forward FLOPs of one token's logits."""
        return 2.0 * self.vocab_size * self.width

    def state_bytes(self, context: int, bytes_per_value: int = 4) -> int:
        """Bytes of one sequence's state after `context` tokens, meta tokens included.

        `bytes_per_value` is that of the model's dtype; recurrent states are fp32 always.
        """
        return sum(op.state_bytes(self.width, context, bytes_per_value) for op in self.operators)


def _read_bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"
