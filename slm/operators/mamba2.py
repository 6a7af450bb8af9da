"""Mamba2: a selective state space with one scalar decay per head (Dao and Gu 2024).

Letters: B rows, T tokens, D width, I inner width, H heads, P head size, N state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.ssd import ssd, ssd_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import RMSNorm, reset_step_sizes


@dataclass(frozen=True)
class Mamba2Config(OperatorConfig):
    """Mamba2 with one group of B and C.

    expand: inner width as a multiple of the width.
    head_dim: size of a head of the inner width.
    state_size: size of the keys B and queries C.
    conv_width: inputs that the short convolution mixes.
    """

    name: ClassVar[str] = "mamba2"
    short_name: ClassVar[str] = "M2"

    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    conv_width: int = 4

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = [
            f"mamba2.{field}: must be > {least - 1}, got {value}"
            for field, value, least in (
                ("expand", self.expand, 1),
                ("head_dim", self.head_dim, 1),
                ("state_size", self.state_size, 1),
                ("conv_width", self.conv_width, 2),
            )
            if value < least
        ]
        if not found and self.expand * width % self.head_dim:
            found.append(
                f"mamba2.head_dim: must divide the inner width {self.expand * width}, "
                f"got {self.head_dim}"
            )
        return found

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Inner width I, heads H, and channels I + 2 N of the convolution."""
        inner = self.expand * width
        return inner, inner // self.head_dim, inner + 2 * self.state_size

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        inner, heads, _ = self.sizes(width)
        vkq = {"v": inner, "k": self.state_size, "q": self.state_size}
        return {
            "in_proj.weight": {"gate": inner} | vkq | {"dt": heads},
            "convolution.weight": vkq,
            "convolution.bias": vkq,
        }

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        inner, heads, channels = self.sizes(width)
        projections = width * (inner + channels + heads) + inner * width
        return projections + channels * (self.conv_width + 1) + 3 * heads + inner

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, convolution, and the state's decay, write and read."""
        inner, heads, channels = self.sizes(width)
        projections = 2.0 * width * (inner + channels + heads) + 2.0 * inner * width
        return projections + 2.0 * channels * self.conv_width + 5.0 * inner * self.state_size

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the convolution's tail."""
        inner, _, channels = self.sizes(width)
        return 4 * inner * self.state_size + (self.conv_width - 1) * channels * bytes_per_value


@register(Mamba2Config)
class Mamba2(Operator):
    """Mamba2 mixer; see `Mamba2Config`."""

    reads = ("in_proj.weight",)
    writes = ("out_proj.weight",)
    value_parts = ("v", "gate", "norm.weight")

    def __init__(self, config: Mamba2Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.inner, self.num_heads, self.channels = config.sizes(width)
        self.in_proj = nn.Linear(width, self.inner + self.channels + self.num_heads, bias=False)
        self.convolution = nn.Conv1d(
            self.channels, self.channels, config.conv_width, groups=self.channels
        )
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in [1, 16], D one, and step sizes log-uniform in [0.001, 0.1]."""
        self.A_log.uniform_(1.0, 16.0).log_()
        self.D.fill_(1.0)
        reset_step_sizes(self.dt_bias)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        gate, inputs, dt = self._project(x)
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        weight, bias = self.convolution.weight.squeeze(1), self.convolution.bias
        mixed = F.silu(causal_convolution(inputs, weight, bias, tail, sequence.documents))
        v, k, q = self._split(mixed)
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            dt = dt * is_real.unsqueeze(-1)
        y, matrix = ssd(
            q, k, v * dt.unsqueeze(-1), -dt * self.A_log.float().exp(), matrix, sequence.documents
        )
        memory = Recurrence(
            matrix, new_tail(inputs, tail, self.config.conv_width, sequence.lengths)
        )
        return self._output(y, v, gate), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        gate, inputs, dt = self._project(x)
        weight, bias = self.convolution.weight.squeeze(1), self.convolution.bias
        mixed = F.silu(causal_convolution_step(inputs, weight, bias, state.tail))
        v, k, q = self._split(mixed)
        y = ssd_step(
            q,
            k,
            v * dt.unsqueeze(-1),
            -dt * self.A_log.float().exp(),
            state.matrix,
        )
        return self._output(y, v, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, N, P] in fp32 and the convolution's tail."""
        weight, config = self.out_proj.weight, self.config
        matrix = weight.new_zeros(
            (batch_size, self.num_heads, config.state_size, config.head_dim), dtype=torch.float32
        )
        tail = weight.new_zeros((batch_size, config.conv_width - 1, self.channels))
        return RecurrentState(matrix, tail)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [..., I], inputs of the convolution [..., I + 2 N], step size [..., H] in fp32."""
        sizes = [self.inner, self.channels, self.num_heads]
        gate, inputs, dt = self.in_proj(x).split(sizes, dim=-1)
        return gate, inputs, F.softplus(dt.float() + self.dt_bias)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v [..., H, P], k = B and q = C [..., N] of the convolution's output."""
        state_size = self.config.state_size
        v, k, q = mixed.split([self.inner, state_size, state_size], dim=-1)
        return v.unflatten(-1, (self.num_heads, -1)), k, q

    def _output(self, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Skip connection, gate, norm and projection of y [..., H, P]."""
        y = (y + self.D[:, None] * v).flatten(-2)
        return self.out_proj(self.norm(y * F.silu(gate.float())).to(gate.dtype))
