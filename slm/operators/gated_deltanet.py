"""Gated DeltaNet: the delta rule on a memory that decays.

Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule".

Letters: B rows, T tokens, D width, H heads, K key size, V value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import RMSNorm, reset_step_sizes, unit


@dataclass(frozen=True)
class GatedDeltaNetConfig(OperatorConfig):
    """Gated DeltaNet with short convolutions and an output gate.

    head_dim: size of keys and queries; the model's width decides how many heads.
    expand_v: size of values as a multiple of `head_dim`.
    conv_width: inputs that the short convolution mixes.
    """

    name: ClassVar[str] = "gated_deltanet"
    short_name: ClassVar[str] = "GD"

    head_dim: int = 64
    expand_v: float = 2.0
    conv_width: int = 4

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.head_dim < 1 or width % self.head_dim:
            found.append(
                f"gated_deltanet.head_dim: must divide the width {width}, got {self.head_dim}"
            )
        elif self.expand_v * self.head_dim < 1 or self.expand_v * self.head_dim % 1:
            found.append(
                f"gated_deltanet.expand_v: must make head_dim {self.head_dim} a whole size > 0, "
                f"got {self.expand_v}"
            )
        if self.conv_width < 2:
            found.append(f"gated_deltanet.conv_width: must be > 1, got {self.conv_width}")
        return found

    def sizes(self, width: int) -> tuple[int, int, int, int]:
        """Heads H, value size V, values H V, and channels 2 D + H V of the convolution."""
        heads, value_size = width // self.head_dim, int(self.expand_v * self.head_dim)
        return heads, value_size, heads * value_size, 2 * width + heads * value_size

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        heads, _, values, _ = self.sizes(width)
        qkv = {"q": width, "k": width, "v": values}
        return {
            "in_proj.weight": qkv | {"gate": values},
            "beta_decay_proj.weight": {"beta": heads, "decay": heads},
            "convolution.weight": qkv,
        }

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        heads, value_size, values, channels = self.sizes(width)
        projections = width * (channels + 2 * values + 2 * heads)
        return projections + channels * self.conv_width + 2 * heads + value_size

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, convolution, and the recurrence: the state's decay, two reads and write."""
        heads, value_size, values, channels = self.sizes(width)
        projections = 2.0 * width * (channels + 2 * values + 2 * heads)
        return projections + 2.0 * channels * self.conv_width + 7.0 * width * value_size

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the convolution's tail."""
        _, value_size, _, channels = self.sizes(width)
        return 4 * width * value_size + (self.conv_width - 1) * channels * bytes_per_value


@register(GatedDeltaNetConfig)
class GatedDeltaNet(Operator):
    """Gated DeltaNet mixer; see `GatedDeltaNetConfig`."""

    reads = ("in_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v", "gate", "o_norm.weight")

    def __init__(self, config: GatedDeltaNetConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.value_size, self.values, self.channels = config.sizes(width)
        self.in_proj = nn.Linear(width, self.channels + self.values, bias=False)
        self.beta_decay_proj = nn.Linear(width, 2 * self.num_heads, bias=False)
        self.convolution = nn.Conv1d(
            self.channels, self.channels, config.conv_width, groups=self.channels, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.o_norm = RMSNorm(self.value_size, eps=1e-5)
        self.o_proj = nn.Linear(self.values, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in [0.01, 16], and step sizes log-uniform in [0.001, 0.1]."""
        # Zero would be −inf after the logarithm.
        self.A_log.uniform_(0.01, 16.0).log_()
        reset_step_sizes(self.dt_bias)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        inputs, gate, g, beta = self._project(x)
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution(inputs, weight, None, tail, sequence.documents))
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            g, beta = g * is_real.unsqueeze(-1), beta * is_real.unsqueeze(-1)
        y, matrix = gated_delta_rule(q, k, v, g, beta, matrix, sequence.documents)
        memory = Recurrence(
            matrix, new_tail(inputs, tail, self.config.conv_width, sequence.lengths)
        )
        return self._output(y, gate), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        inputs, gate, g, beta = self._project(x)
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution_step(inputs, weight, None, state.tail))
        y = gated_delta_rule_step(q, k, v, g, beta, state.matrix)
        return self._output(y, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, V] in fp32 and the convolution's tail."""
        weight, config = self.o_proj.weight, self.config
        matrix = weight.new_zeros(
            (batch_size, self.num_heads, config.head_dim, self.value_size), dtype=torch.float32
        )
        tail = weight.new_zeros((batch_size, config.conv_width - 1, self.channels))
        return RecurrentState(matrix, tail)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the convolution, gate [..., H, V]; log decay and beta [..., H] in fp32."""
        inputs, gate = self.in_proj(x).split([self.channels, self.values], dim=-1)
        beta, dt = self.beta_decay_proj(x).float().chunk(2, dim=-1)
        g = -self.A_log.float().exp() * F.softplus(dt + self.dt_bias)
        return inputs, gate.unflatten(-1, (self.num_heads, -1)), g, beta.sigmoid()

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [..., H, K] (of unit length, fp32) and v [..., H, V] of the convolution's output."""
        keys = self.channels - self.values
        qk, v = F.silu(mixed).split([keys, self.values], dim=-1)
        q, k = unit(qk.unflatten(-1, (2, self.num_heads, -1))).unbind(-3)
        return q, k, v.unflatten(-1, (self.num_heads, -1))

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm of each head, gate and projection of y [..., H, V]."""
        y = self.o_norm(y) * F.silu(gate.float())
        return self.o_proj(y.to(gate.dtype).flatten(-2))
