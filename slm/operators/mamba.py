"""Mamba: a selective state space with one decay per channel and state (Gu and Dao 2023).

Letters: B rows, T tokens, D width, I inner width, N state size, R rank of the step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.selective_scan import selective_scan, selective_scan_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import reset_step_sizes


@dataclass(frozen=True)
class MambaConfig(OperatorConfig):
    """Mamba.

    expand: inner width as a multiple of the width.
    state_size: values that each channel of the inner width remembers.
    conv_width: inputs that the short convolution mixes.
    """

    name: ClassVar[str] = "mamba"
    short_name: ClassVar[str] = "M"

    expand: int = 2
    state_size: int = 16
    conv_width: int = 4

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        return [
            f"mamba.{field}: must be > {least - 1}, got {value}"
            for field, value, least in (
                ("expand", self.expand, 1),
                ("state_size", self.state_size, 1),
                ("conv_width", self.conv_width, 2),
            )
            if value < least
        ]

    def sizes(self, width: int) -> tuple[int, int]:
        """Inner width I, and rank R = ⌈D / 16⌉ of the step size."""
        return self.expand * width, -(-width // 16)

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        inner, rank = self.sizes(width)
        return {
            "in_proj.weight": {"x": inner, "gate": inner},
            "x_proj.weight": {"dt": rank, "B": self.state_size, "C": self.state_size},
        }

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        inner, rank = self.sizes(width)
        projections = 3 * width * inner + inner * (rank + 2 * self.state_size) + rank * inner
        # Of each channel: the convolution with its bias, A, D and the bias of the step size.
        return projections + inner * (self.conv_width + 1 + self.state_size + 2)

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, convolution, and the recurrence: the state's decay, write and read."""
        inner, rank = self.sizes(width)
        projections = 6.0 * width * inner + 2.0 * inner * (2 * rank + 2 * self.state_size)
        return projections + 2.0 * inner * self.conv_width + 5.0 * inner * self.state_size

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the convolution's tail."""
        inner, _ = self.sizes(width)
        return 4 * inner * self.state_size + (self.conv_width - 1) * inner * bytes_per_value


@register(MambaConfig)
class Mamba(Operator):
    """Mamba mixer; see `MambaConfig`."""

    reads = ("in_proj.weight",)
    writes = ("out_proj.weight",)
    value_parts = (
        "x",
        "gate",
        "convolution.weight",
        "convolution.bias",
        "dt_weight",
        "dt_bias",
        "A_log",
        "D",
    )
    undecayed = ("A_log",)

    def __init__(self, config: MambaConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.inner, self.rank = config.sizes(width)
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.convolution = nn.Conv1d(self.inner, self.inner, config.conv_width, groups=self.inner)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * config.state_size, bias=False)
        self.dt_weight = nn.Parameter(torch.empty(self.inner, self.rank))
        self.dt_bias = nn.Parameter(torch.empty(self.inner))
        self.A_log = nn.Parameter(torch.empty(self.inner, config.state_size))
        self.D = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A one to N, D one, and step sizes log-uniform in [0.001, 0.1]."""
        bound = self.rank**-0.5
        self.dt_weight.uniform_(-bound, bound)
        reset_step_sizes(self.dt_bias)
        states = torch.arange(1, self.config.state_size + 1, device=self.A_log.device)
        self.A_log.copy_(states.float().log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        inputs, gate = self.in_proj(x).chunk(2, dim=-1)
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        weight, bias = self.convolution.weight.squeeze(1), self.convolution.bias
        mixed = F.silu(causal_convolution(inputs, weight, bias, tail, sequence.documents))
        dt, A, B, C = self._select(mixed)
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            dt = dt * is_real.unsqueeze(-1)
        y, matrix = selective_scan(mixed, dt, A, B, C, matrix, sequence.documents)
        memory = Recurrence(
            matrix, new_tail(inputs, tail, self.config.conv_width, sequence.lengths)
        )
        return self._output(y, mixed, gate), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        inputs, gate = self.in_proj(x).chunk(2, dim=-1)
        weight, bias = self.convolution.weight.squeeze(1), self.convolution.bias
        mixed = F.silu(causal_convolution_step(inputs, weight, bias, state.tail))
        dt, A, B, C = self._select(mixed)
        y = selective_scan_step(mixed, dt, A, B, C, state.matrix)
        return self._output(y, mixed, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, I, N] in fp32 and the convolution's tail."""
        weight, config = self.out_proj.weight, self.config
        matrix = weight.new_zeros((batch_size, self.inner, config.state_size), dtype=torch.float32)
        tail = weight.new_zeros((batch_size, config.conv_width - 1, self.inner))
        return RecurrentState(matrix, tail)

    def _select(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step size [..., I] and A [I, N], both fp32, B and C [..., N], of mixed [..., I]."""
        state_size = self.config.state_size
        dt, B, C = self.x_proj(mixed).split([self.rank, state_size, state_size], dim=-1)
        dt = F.softplus(F.linear(dt, self.dt_weight).float() + self.dt_bias)
        return dt, -self.A_log.float().exp(), B, C

    def _output(self, y: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
        """Skip connection, gate and projection of y [..., I]."""
        y = (y + self.D * mixed) * F.silu(gate.float())
        return self.out_proj(y.to(gate.dtype))
