"""The workload: what is timed."""

from __future__ import annotations

from typing import Literal

import torch

from slm.config import ConfigError, schema


@schema
class Workload:
    """One request: a batch of prompts, each of which is answered with as many new tokens.

    batch_size: rows decoded together.
    prompt_tokens: tokens of each prompt, meta tokens not counted.
    new_tokens: tokens produced per row. The prompt's prefill gives the first; every other one
        takes a decoding step. At least 2, so that there is a time per output token.
    dtype: of weights and activations.

    Raises ValueError with every problem in it.
    """

    batch_size: int = 1
    prompt_tokens: int
    new_tokens: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Why the workload cannot be run; empty when it can."""
        return [
            f"{field}: must be >= {least}, got {value}"
            for field, value, least in (
                ("batch_size", self.batch_size, 1),
                ("prompt_tokens", self.prompt_tokens, 1),
                ("new_tokens", self.new_tokens, 2),
            )
            if value < least
        ]

    def __str__(self) -> str:
        """A short name that is safe in file names: 'b1-p64-n64-float32'."""
        return f"b{self.batch_size}-p{self.prompt_tokens}-n{self.new_tokens}-{self.dtype}"

    @property
    def max_tokens(self) -> int:
        """Tokens of a row when the request is done."""
        return self.prompt_tokens + self.new_tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
