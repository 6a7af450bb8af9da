"""DeltaNet: linear attention whose memory corrects itself (Yang et al. 2024).

Letters: B rows, T tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.delta_rule import delta_rule, delta_rule_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import RMSNorm, unit


@dataclass(frozen=True)
class DeltaNetConfig(OperatorConfig):
    """DeltaNet with short convolutions.

    head_dim: size of keys, queries and values; the model's width decides how many heads.
    conv_width: inputs that the short convolution mixes.
    """

    name: ClassVar[str] = "deltanet"
    short_name: ClassVar[str] = "D"

    head_dim: int = 64
    conv_width: int = 4

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.head_dim < 1 or width % self.head_dim:
            found.append(f"deltanet.head_dim: must divide the width {width}, got {self.head_dim}")
        if self.conv_width < 2:
            found.append(f"deltanet.conv_width: must be > 1, got {self.conv_width}")
        return found

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        qkv = {"q": width, "k": width, "v": width}
        return {"qkv_proj.weight": qkv, "convolution.weight": qkv}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        projections = 4 * width * width + width // self.head_dim * width
        return projections + 3 * width * self.conv_width + self.head_dim

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, convolutions, and the state's two reads and one write."""
        projections = 8.0 * width * width + 2.0 * width // self.head_dim * width
        return projections + 6.0 * width * self.conv_width + 6.0 * width * self.head_dim

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the convolutions' tail."""
        tail = (self.conv_width - 1) * 3 * width
        return 4 * width * self.head_dim + tail * bytes_per_value


@register(DeltaNetConfig)
class DeltaNet(Operator):
    """DeltaNet mixer; see `DeltaNetConfig`."""

    reads = ("qkv_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v", "o_norm.weight")

    def __init__(self, config: DeltaNetConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.beta_proj = nn.Linear(width, self.num_heads, bias=False)
        self.convolution = nn.Conv1d(
            3 * width, 3 * width, config.conv_width, groups=3 * width, bias=False
        )
        self.o_norm = RMSNorm(config.head_dim, eps=1e-5)
        self.o_proj = nn.Linear(width, width, bias=False)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        inputs, beta = self.qkv_proj(x), self.beta_proj(x).sigmoid()
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution(inputs, weight, None, tail, sequence.documents))
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            beta = beta * is_real.unsqueeze(-1)
        y, matrix = delta_rule(q, k, v, beta, matrix, sequence.documents)
        memory = Recurrence(
            matrix, new_tail(inputs, tail, self.config.conv_width, sequence.lengths)
        )
        return self._output(y, x.dtype), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        inputs, beta = self.qkv_proj(x), self.beta_proj(x).sigmoid()
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution_step(inputs, weight, None, state.tail))
        y = delta_rule_step(q, k, v, beta, state.matrix)
        return self._output(y, x.dtype)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, K] in fp32 and the convolutions' tail."""
        weight, size = self.o_proj.weight, self.config.head_dim
        matrix = weight.new_zeros((batch_size, self.num_heads, size, size), dtype=torch.float32)
        tail = weight.new_zeros((batch_size, self.config.conv_width - 1, 3 * weight.shape[0]))
        return RecurrentState(matrix, tail)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (of unit length, fp32) and v [..., H, K] of the convolution's output."""
        qk, v = F.silu(mixed).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=-3)
        q, k = unit(qk).unbind(-3)
        return q, k, v.squeeze(-3)

    def _output(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Norm of each head and projection of y [..., H, K]."""
        return self.o_proj(self.o_norm(y).to(dtype).flatten(-2))
