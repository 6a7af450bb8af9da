"""Gated linear attention: a matrix memory whose every key channel decays at its own rate.

Yang et al. 2023, "Gated Linear Attention Transformers with Hardware-Efficient Training".

Letters: B rows, T tokens, D width, H heads, K key size, V value size, R rank of the decay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.gla import gla, gla_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import RMSNorm, no_tail

DECAY_RANK = 16
# Takes the decay of a token close to one at first: sigmoid(0) ** (1 / 16) = 0.96.
DECAY_TEMPERATURE = 16.0


@dataclass(frozen=True)
class GLAConfig(OperatorConfig):
    """Gated linear attention with an output gate.

    head_dim: share of the width that a head stands for; the model's width decides how many heads.
    expand_k, expand_v: sizes of keys and of values as multiples of `head_dim`.
    """

    name: ClassVar[str] = "gla"
    short_name: ClassVar[str] = "GLA"

    head_dim: int = 64
    expand_k: float = 0.5
    expand_v: float = 1.0

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        if self.head_dim < 1 or width % self.head_dim:
            return [f"gla.head_dim: must divide the width {width}, got {self.head_dim}"]
        return [
            f"gla.{field}: must make head_dim {self.head_dim} a whole size > 0, got {value}"
            for field, value in (("expand_k", self.expand_k), ("expand_v", self.expand_v))
            if value * self.head_dim < 1 or value * self.head_dim % 1
        ]

    def sizes(self, width: int) -> tuple[int, int, int]:
        """Heads H, key size K and value size V of a head."""
        heads = width // self.head_dim
        return heads, int(self.expand_k * self.head_dim), int(self.expand_v * self.head_dim)

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        heads, key_size, value_size = self.sizes(width)
        keys, values = heads * key_size, heads * value_size
        return {"in_proj.weight": {"q": keys, "k": keys, "v": values, "gate": values}}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        heads, key_size, value_size = self.sizes(width)
        projections = width * heads * (2 * key_size + 3 * value_size)
        decay = DECAY_RANK * width + (DECAY_RANK + 1) * heads * key_size
        return projections + decay + value_size

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, and the recurrence: the state's decay, write and read."""
        heads, key_size, value_size = self.sizes(width)
        projections = 2.0 * width * heads * (2 * key_size + 3 * value_size)
        decay = 2.0 * DECAY_RANK * (width + heads * key_size)
        return projections + decay + 5.0 * heads * key_size * value_size

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32."""
        heads, key_size, value_size = self.sizes(width)
        return 4 * heads * key_size * value_size


@register(GLAConfig)
class GLA(Operator):
    """Gated linear attention mixer; see `GLAConfig`."""

    reads = ("in_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v", "gate", "o_norm.weight")

    def __init__(self, config: GLAConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.key_size, self.value_size = config.sizes(width)
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        self.in_proj = nn.Linear(width, 2 * keys + 2 * values, bias=False)
        self.decay_down_proj = nn.Linear(width, DECAY_RANK, bias=False)
        self.decay_up_proj = nn.Linear(DECAY_RANK, keys)
        self.o_norm = RMSNorm(self.value_size, eps=1e-5)
        self.o_proj = nn.Linear(values, width, bias=False)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        q, k, v, gate, g = self._project(x)
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            k, g = k * is_real[..., None, None], g * is_real[..., None, None]
        matrix = None if start is None else start.matrix
        y, matrix = gla(q, k, v, g, matrix, sequence.documents)
        return self._output(y, gate), Recurrence(matrix, no_tail(matrix))

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        q, k, v, gate, g = self._project(x)
        y = gla_step(q, k, v, g, state.matrix)
        return self._output(y, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, V] in fp32."""
        matrix = self.o_proj.weight.new_zeros(
            (batch_size, self.num_heads, self.key_size, self.value_size), dtype=torch.float32
        )
        return RecurrentState(matrix, no_tail(matrix))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k [..., H, K], v and gate [..., H, V], log decay [..., H, K] in fp32."""
        sizes = [self.key_size, self.key_size, self.value_size, self.value_size]
        parts = self.in_proj(x).split([self.num_heads * size for size in sizes], dim=-1)
        q, k, v, gate = (part.unflatten(-1, (self.num_heads, -1)) for part in parts)
        g = self.decay_up_proj(self.decay_down_proj(x)).unflatten(-1, (self.num_heads, -1))
        return q, k, v, gate, F.logsigmoid(g.float()) / DECAY_TEMPERATURE

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        """Norm of each head, gate and projection of y [..., H, V]."""
        y = self.o_norm(y) * F.silu(gate.float())
        return self.o_proj(y.to(gate.dtype).flatten(-2))
