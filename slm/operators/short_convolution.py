"""The gated short convolution of LFM2 (Liquid AI 2025, "LFM2 Technical Report").

Letters: B rows, T tokens, D width, W width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.operators.base import Operator, OperatorConfig, Sequence, State, register


@dataclass(frozen=True)
class ShortConvolutionConfig(OperatorConfig):
    """Gated short convolution, out(C · convolution(B · x)).

    conv_width: inputs that the convolution mixes.
    """

    name: ClassVar[str] = "short_convolution"
    short_name: ClassVar[str] = "SC"

    conv_width: int = 3

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        if self.conv_width < 2:
            return [f"short_convolution.conv_width: must be > 1, got {self.conv_width}"]
        return []

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        return {"in_proj.weight": {"B": width, "C": width, "x": width}}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        return 4 * width * width + width * self.conv_width

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections and convolution."""
        return 8.0 * width * width + 2.0 * width * self.conv_width

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The convolution's tail."""
        return (self.conv_width - 1) * width * bytes_per_value


class TailState(State):
    """The last inputs of the convolution, tail [B, W − 1, D]; the memory is a tensor like it."""

    def __init__(self, tail: Tensor) -> None:
        self.tail = tail

    def tensors(self) -> list[Tensor]:
        """The convolution's tail."""
        return [self.tail]

    def read(self) -> Tensor:
        """What the state holds, as a memory."""
        return self.tail

    def write(self, memory: Tensor, sequence: Sequence) -> None:
        """Take over the tail, in place."""
        self.tail.copy_(memory.expand_as(self.tail))


@register(ShortConvolutionConfig)
class ShortConvolution(Operator):
    """Gated short convolution; see `ShortConvolutionConfig`."""

    reads = ("in_proj.weight",)
    writes = ("out_proj.weight",)
    value_parts = ("B", "C", "x", "convolution.weight")

    def __init__(self, config: ShortConvolutionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.convolution = nn.Conv1d(width, width, config.conv_width, groups=width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def scan(self, x: Tensor, sequence: Sequence, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Operator.scan`."""
        B, C, x = self.in_proj(x).chunk(3, dim=-1)
        inputs = B * x
        weight = self.convolution.weight.squeeze(1)
        mixed = causal_convolution(inputs, weight, None, start, sequence.documents)
        memory = new_tail(inputs, start, self.config.conv_width, sequence.lengths)
        return self.out_proj(C * mixed), memory

    def step(self, x: Tensor, state: TailState) -> Tensor:
        """See `Operator.step`."""
        B, C, x = self.in_proj(x).chunk(3, dim=-1)
        weight = self.convolution.weight.squeeze(1)
        return self.out_proj(C * causal_convolution_step(B * x, weight, None, state.tail))

    def init_state(self, batch_size: int, max_tokens: int) -> TailState:
        """Zeros: the convolution's tail."""
        weight = self.out_proj.weight
        return TailState(
            weight.new_zeros((batch_size, self.config.conv_width - 1, weight.shape[0]))
        )
