"""Kimi Delta Attention: DeltaNet with a decay per channel of the keys (Kimi Team 2025).

"Kimi Linear: An Expressive, Efficient Attention Architecture".

Letters: B rows, T tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.kda import kda, kda_step
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
class KDAConfig(OperatorConfig):
    """Kimi Delta Attention with short convolutions and low-rank gates.

    head_dim: size of keys, queries and values, and rank of the decay and of the output gate; the
        model's width decides how many heads.
    conv_width: inputs that the short convolution mixes.
    """

    name: ClassVar[str] = "kda"
    short_name: ClassVar[str] = "KDA"

    head_dim: int = 128
    conv_width: int = 4

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.head_dim < 1 or width % self.head_dim:
            found.append(f"kda.head_dim: must divide the width {width}, got {self.head_dim}")
        if self.conv_width < 2:
            found.append(f"kda.conv_width: must be > 1, got {self.conv_width}")
        return found

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        qkv = {"q": width, "k": width, "v": width}
        return {"qkv_proj.weight": qkv, "convolution.weight": qkv}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        heads = width // self.head_dim
        projections = 4 * width * width + heads * width + 4 * width * self.head_dim
        return projections + 3 * width * self.conv_width + heads + width + self.head_dim

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, convolutions, and the state's decay, two reads and one write."""
        projections = 8.0 * width * width + 2.0 * width // self.head_dim * width
        gates = 8.0 * width * self.head_dim
        return projections + gates + 6.0 * width * self.conv_width + 7.0 * width * self.head_dim

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the convolutions' tail."""
        tail = (self.conv_width - 1) * 3 * width
        return 4 * width * self.head_dim + tail * bytes_per_value


@register(KDAConfig)
class KDA(Operator):
    """Kimi Delta Attention mixer; see `KDAConfig`."""

    reads = ("qkv_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v", "gate_up_proj.weight", "o_norm.weight")

    def __init__(self, config: KDAConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.beta_proj = nn.Linear(width, self.num_heads, bias=False)
        self.decay_down_proj = nn.Linear(width, config.head_dim, bias=False)
        self.decay_up_proj = nn.Linear(config.head_dim, width, bias=False)
        self.gate_down_proj = nn.Linear(width, config.head_dim, bias=False)
        self.gate_up_proj = nn.Linear(config.head_dim, width, bias=False)
        self.convolution = nn.Conv1d(
            3 * width, 3 * width, config.conv_width, groups=3 * width, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.o_norm = RMSNorm(config.head_dim, eps=1e-5)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in [1, 16], and step sizes log-uniform in [0.001, 0.1]."""
        self.A_log.uniform_(1.0, 16.0).log_()
        reset_step_sizes(self.dt_bias)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        inputs, g, beta, gate = self._project(x)
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution(inputs, weight, None, tail, sequence.documents))
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            g, beta = g * is_real[..., None, None], beta * is_real.unsqueeze(-1)
        y, matrix = kda(q, k, v, g, beta, matrix, sequence.documents)
        memory = Recurrence(
            matrix, new_tail(inputs, tail, self.config.conv_width, sequence.lengths)
        )
        return self._output(y, gate), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        inputs, g, beta, gate = self._project(x)
        weight = self.convolution.weight.squeeze(1)
        q, k, v = self._split(causal_convolution_step(inputs, weight, None, state.tail))
        y = kda_step(q, k, v, g, beta, state.matrix)
        return self._output(y, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, K] in fp32 and the convolutions' tail."""
        weight, size = self.o_proj.weight, self.config.head_dim
        matrix = weight.new_zeros((batch_size, self.num_heads, size, size), dtype=torch.float32)
        tail = weight.new_zeros((batch_size, self.config.conv_width - 1, 3 * weight.shape[0]))
        return RecurrentState(matrix, tail)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the convolution [..., 3 D], log decay [..., H, K] in fp32, beta [..., H], gate.

        The gate is [..., H, K].
        """
        dt = self.decay_up_proj(self.decay_down_proj(x)).float()
        g = -self.A_log.float().exp()[:, None] * self._heads(F.softplus(dt + self.dt_bias))
        gate = self._heads(self.gate_up_proj(self.gate_down_proj(x)))
        return self.qkv_proj(x), g, self.beta_proj(x).sigmoid(), gate

    def _heads(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., H, K]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (of unit length, fp32) and v [..., H, K] of the convolution's output."""
        qk, v = F.silu(mixed).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=-3)
        q, k = unit(qk).unbind(-3)
        return q, k, v.squeeze(-3)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm of each head, gate and projection of y [..., H, K]."""
        y = self.o_norm(y) * gate.float().sigmoid()
        return self.o_proj(y.to(gate.dtype).flatten(-2))
