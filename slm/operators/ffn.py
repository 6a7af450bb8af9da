"""The feed-forward network: SwiGLU (Shazeer 2020) or squared ReLU (So et al. 2021).

Letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.swiglu import swiglu
from slm.operators.base import Operator, OperatorConfig, Sequence, State, register


@dataclass(frozen=True)
class FFNConfig(OperatorConfig):
    """A feed-forward network.

    ratio: hidden width as a multiple of the width, rounded down to `multiple_of`.
    multiple_of: what the hidden width is a multiple of.
    activation: 'swiglu', down(silu(gate(x)) · up(x)), or 'relu2', down(relu(up(x))²).
    """

    name: ClassVar[str] = "ffn"
    short_name: ClassVar[str] = "F"

    ratio: float = 3.0
    multiple_of: int = 32
    activation: str = "swiglu"

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.multiple_of < 1:
            found.append(f"ffn.multiple_of: must be > 0, got {self.multiple_of}")
        elif self.hidden(width) < 1:
            least = self.multiple_of / width
            found.append(f"ffn.ratio: must be >= {least:g} at width {width}, got {self.ratio}")
        if self.activation not in ("swiglu", "relu2"):
            found.append(f"ffn.activation: must be 'swiglu' or 'relu2', got {self.activation!r}")
        return found

    def hidden(self, width: int) -> int:
        """The hidden width."""
        return int(self.ratio * width) // self.multiple_of * self.multiple_of

    @property
    def num_inner(self) -> int:
        """Hidden vectors that are read from the stream: gate and up, or up alone."""
        return 2 if self.activation == "swiglu" else 1

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        names = ("gate", "up")[-self.num_inner :]
        return {"gate_up_proj.weight": dict.fromkeys(names, self.hidden(width))}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        return (self.num_inner + 1) * width * self.hidden(width)

    def flops_per_token(self, width: int, context: int) -> float:
        """The projections."""
        return 2.0 * self.parameters(width)

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """Nothing is remembered."""
        return 0


@register(FFNConfig)
class FFN(Operator):
    """Feed-forward network; see `FFNConfig`."""

    reads = ("gate_up_proj.weight",)
    writes = ("down_proj.weight",)
    value_parts = ("gate", "up")

    def __init__(self, config: FFNConfig, width: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden(width)
        self.gate_up_proj = nn.Linear(width, config.num_inner * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def scan(self, x: Tensor, sequence: Sequence, start: None) -> tuple[Tensor, None]:
        """See `Operator.scan`."""
        return self._mix(x), None

    def step(self, x: Tensor, state: State) -> Tensor:
        """See `Operator.step`."""
        return self._mix(x)

    def init_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty state."""
        return State()

    def _mix(self, x: Tensor) -> Tensor:
        if self.config.activation == "relu2":
            return self.down_proj(F.relu(self.gate_up_proj(x)).square())
        return self.down_proj(swiglu(self.gate_up_proj(x)))
