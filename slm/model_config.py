"""The `model` node of a config: blocks of operators, and the order in which they repeat."""

from __future__ import annotations

from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.operators import OperatorConfig, parse_operator


@schema
class BlockConfig:
    """A short ordered list of operators, each 'name' or 'name(field=value,…)'."""

    operators: tuple[str, ...]

    def __post_init__(self) -> None:
        problems = [] if self.operators else ["operators: must not be empty"]
        for place, text in enumerate(self.operators):
            try:
                parse_operator(text)
            except ValueError as error:
                problems.append(f"operators.{place}: {error}")
        if problems:
            raise ConfigError(problems)

    def parse(self) -> tuple[OperatorConfig, ...]:
        """The operators' configs."""
        return tuple(parse_operator(text) for text in self.operators)


@schema
class ModelConfig:
    """What a person writes to say which model they want.

    blocks: the kinds of block, each under a letter.
    pattern: letters in the order of the blocks; repeated until there are `depth`.
    depth: number of blocks.
    vocab_size: None takes the tokenizer's.
    The rest is as in `Architecture`.
    """

    width: int
    depth: int
    blocks: dict[str, BlockConfig]
    pattern: str = "A"
    meta_tokens: int = 0
    tie_embeddings: bool = True
    normalize_logits: bool = False
    norm_eps: float = 1e-5
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"pattern: block {letter!r} is not among blocks ({', '.join(self.blocks) or 'none'})"
            for letter in dict.fromkeys(self.pattern)
            if letter not in self.blocks
        ]
        if not self.pattern:
            problems.append("pattern: must not be empty")
        if self.depth < 1:
            problems.append(f"depth: must be >= 1, got {self.depth}")
        if not problems:
            problems = self._problems_of_architecture()
        if problems:
            raise ConfigError(problems)

    def operators(self) -> tuple[OperatorConfig, ...]:
        """The whole sequence of operators."""
        letters = (self.pattern * self.depth)[: self.depth]
        return tuple(operator for letter in letters for operator in self.blocks[letter].parse())

    def architecture(self, tokenizer_vocab_size: int) -> Architecture:
        """The architecture, with the tokenizer's vocabulary unless `vocab_size` is larger.

        Raises ConfigError if `vocab_size` cannot hold the tokenizer's vocabulary.
        """
        vocab_size = self.vocab_size or tokenizer_vocab_size
        if vocab_size < tokenizer_vocab_size:
            raise ConfigError(
                [
                    f"model.vocab_size: {vocab_size} is too small for the tokenizer's "
                    f"{tokenizer_vocab_size} tokens"
                ]
            )
        return self._architecture(vocab_size)

    def _architecture(self, vocab_size: int) -> Architecture:
        return Architecture(
            width=self.width,
            vocab_size=vocab_size,
            operators=self.operators(),
            meta_tokens=self.meta_tokens,
            tie_embeddings=self.tie_embeddings,
            normalize_logits=self.normalize_logits,
            norm_eps=self.norm_eps,
        )

    def _problems_of_architecture(self) -> list[str]:
        try:
            self._architecture(1 if self.vocab_size is None else self.vocab_size)
        except ValueError as error:
            return str(error).split("; ")
        return []
