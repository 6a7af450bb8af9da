"""The feed-forward network: SwiGLU (Shazeer 2020).

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from slm.operators.base import Operator, OperatorConfig, Sequence, State, register


@dataclass(frozen=True)
class FFNConfig(OperatorConfig):
    """SwiGLU, down(silu(gate(x)) · up(x)).

    ratio: hidden width as a multiple of the width, rounded down to `multiple_of`.
    multiple_of: what the hidden width is a multiple of.
    """

    name: ClassVar[str] = "ffn"

    ratio: float = 3.0
    multiple_of: int = 32

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        if self.multiple_of < 1:
            return [f"ffn.multiple_of: must be > 0, got {self.multiple_of}"]
        if self.hidden(width) < 1:
            least = self.multiple_of / width
            return [f"ffn.ratio: must be >= {least:g} at width {width}, got {self.ratio}"]
        return []

    def hidden(self, width: int) -> int:
        """The hidden width."""
        return int(self.ratio * width) // self.multiple_of * self.multiple_of

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        return 3 * width * self.hidden(width)

    def flops_per_token(self, width: int, context: int) -> float:
        """Three projections."""
        return 6.0 * width * self.hidden(width)

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """Nothing is remembered."""
        return 0


@register(FFNConfig)
class FFN(Operator):
    """SwiGLU feed-forward network; see `FFNConfig`."""

    reads = ("gate_up_proj.weight",)
    writes = ("down_proj.weight",)

    def __init__(self, config: FFNConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up_proj = nn.Linear(width, 2 * config.hidden(width), bias=False)
        self.down_proj = nn.Linear(config.hidden(width), width, bias=False)

    def scan(self, x: Tensor, sequence: Sequence, start: None) -> tuple[Tensor, None]:
        """See `Operator.scan`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up), None

    def step(self, x: Tensor, state: State) -> Tensor:
        """See `Operator.step`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)

    def init_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty state."""
        return State()
