"""RWKV-7: a diagonal decay, and a rank-one change of what the memory holds (Peng et al. 2025).

"RWKV-7 Goose with Expressive Dynamic State Evolution", its time mixing.

Letters: B rows, T tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.convolution import new_tail, with_tail
from slm.kernels.rwkv7 import rwkv7, rwkv7_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)

# exp(−½): the logarithm of the decay lies between its negative and 0.
FASTEST_DECAY = math.exp(-0.5)


@dataclass(frozen=True)
class RWKV7Config(OperatorConfig):
    """RWKV-7's time mixing.

    head_dim: size of a head; the model's width decides how many heads, and the ranks.
    """

    name: ClassVar[str] = "rwkv7"
    short_name: ClassVar[str] = "R7"

    head_dim: int = 64

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        if self.head_dim < 2 or width % self.head_dim:
            return [
                f"rwkv7.head_dim: must be > 1 and divide the width {width}, got {self.head_dim}"
            ]
        return []

    def ranks(self, width: int) -> tuple[int, int, int]:
        """Ranks of the decay w, the rate a and the gate g, by the reference's rule of thumb."""
        factors = (2.5 * self.head_dim / 64, 2.5 * self.head_dim / 64, 5.0)
        w, a, g = (max(32, round(factor * width**0.5 / 32) * 32) for factor in factors)
        return w, a, g

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        projections = 4 * width * width + 2 * width * sum(self.ranks(width))
        # Six shares of the token shift; k_k, k_a, r_k; two biases; the norm.
        return projections + 13 * width

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, and the state's decay, two reads and two writes."""
        projections = 8.0 * width * width + 4.0 * width * sum(self.ranks(width))
        return projections + 9.0 * width * self.head_dim

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32, and the previous input."""
        return 4 * width * self.head_dim + width * bytes_per_value


@register(RWKV7Config)
class RWKV7(Operator):
    """RWKV-7 mixer; see `RWKV7Config`.

    It is the first layer of the reference: later layers there mix the first one's values into
    their own, but an operator sees nothing except its own input.
    """

    reads = ("r_proj.weight", "k_proj.weight", "v_proj.weight")
    writes = ("o_proj.weight",)
    value_parts = ("v_proj.weight", "g_up_proj.weight", "norm_weight", "norm_bias")

    def __init__(self, config: RWKV7Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        w_rank, a_rank, g_rank = config.ranks(width)
        # How much of the previous input r, w, k, v, a and g see.
        self.mix = nn.Parameter(torch.empty(6, 1, width))
        self.r_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.w_down_proj = nn.Linear(width, w_rank, bias=False)
        self.w_up_proj = nn.Linear(w_rank, width)
        self.a_down_proj = nn.Linear(width, a_rank, bias=False)
        self.a_up_proj = nn.Linear(a_rank, width)
        self.g_down_proj = nn.Linear(width, g_rank, bias=False)
        self.g_up_proj = nn.Linear(g_rank, width, bias=False)
        self.k_k = nn.Parameter(torch.empty(width))
        self.k_a = nn.Parameter(torch.empty(width))
        self.r_k = nn.Parameter(torch.empty(width))
        self.norm_weight = nn.Parameter(torch.empty(width))
        self.norm_bias = nn.Parameter(torch.empty(width))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the first layer of the reference, which starts as a mixer that writes nothing.

        Except for the norm's weight: there it grows with the depth of the layer, here it is one.
        """
        place = torch.arange(self.k_k.shape[0], dtype=torch.float32, device=self.k_k.device)
        share = place / len(place)
        for mix, power in zip(self.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            mix.copy_(1.0 - share**power)
        # From 0 to 1 over the width, and from −1 to 1 over each head, flat in the middle.
        linear = place / (len(place) - 1)
        zigzag = 2.0 * (place % self.config.head_dim) / (self.config.head_dim - 1) - 1.0
        zigzag = zigzag * zigzag.abs()
        self.k_k.copy_(0.76 - 0.1 * linear)
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for down in (self.w_down_proj, self.a_down_proj, self.g_down_proj):
            nn.init.zeros_(down.weight)
        for up in (self.w_up_proj, self.a_up_proj, self.g_up_proj):
            width, rank = up.weight.shape
            _orthogonal(up.weight, 0.1 * max(1.0, (rank / width) ** 0.5))
        self.w_up_proj.bias.copy_(6.0 * linear - 5.5 + 2.5 * zigzag)
        self.a_up_proj.bias.copy_(0.4 * linear - 0.39 + 0.3 * zigzag)
        _orthogonal(self.r_proj.weight, 1.0)
        _orthogonal(self.k_proj.weight, 0.1)
        _orthogonal(self.v_proj.weight, 1.0)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        matrix, tail = (None, None) if start is None else (start.matrix, start.tail)
        padded = with_tail(x, tail, 2)
        previous = padded[:, :-1]
        if sequence.documents is not None:
            previous = torch.where(sequence.documents.begins.unsqueeze(-1), padded[:, :1], previous)
        r, w, k, v, a, b, gate = self._project(x, previous)
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            w, k, b = (y * is_real[..., None, None] for y in (w, k, b))
        y, matrix = rwkv7(r, w, k, v, a, b, matrix, sequence.documents)
        memory = Recurrence(matrix, new_tail(x, tail, 2, sequence.lengths))
        return self._output(y, r, k, v, gate), memory

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        r, w, k, v, a, b, gate = self._project(x, state.tail.squeeze(1))
        state.tail.copy_(x.unsqueeze(1))
        y = rwkv7_step(r, w, k, v, a, b, state.matrix)
        return self._output(y, r, k, v, gate)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, K] in fp32 and the previous input."""
        weight, size = self.o_proj.weight, self.config.head_dim
        matrix = weight.new_zeros((batch_size, self.num_heads, size, size), dtype=torch.float32)
        return RecurrentState(matrix, weight.new_zeros((batch_size, 1, weight.shape[0])))

    def _project(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """r, w, k, v, a, b [..., H, K] of the recurrence, and the gate [..., D]; w, a, b in fp32.

        A step of the recurrence removes, at a learned rate, what the memory holds
        under the direction of a key, and adds the value under the key itself.
        """
        shift = previous - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + shift * mix for mix in self.mix)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        w = self.w_up_proj(self.w_down_proj(x_w).tanh())
        w = -FASTEST_DECAY * w.float().sigmoid()
        rate = self.a_up_proj(self.a_down_proj(x_a)).sigmoid()
        gate = self.g_up_proj(self.g_down_proj(x_g).sigmoid())
        removed = F.normalize(self._heads(k * self.k_k).float(), dim=-1)
        k = k * (1.0 + (rate - 1.0) * self.k_a)
        r, w, k, v, rate = (self._heads(y) for y in (r, w, k, v, rate))
        return r, w, k, v, -removed, removed * rate, gate

    def _heads(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., H, K]."""
        return x.unflatten(-1, (self.num_heads, -1))

    def _output(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """Norm of each head of y [..., H, K], the token's own value, gate and projection."""
        y = F.layer_norm(y, y.shape[-1:], eps=1e-5 * self.config.head_dim).flatten(-2)
        y = y * self.norm_weight + self.norm_bias
        own = (r * k * self._heads(self.r_k)).sum(-1, keepdim=True) * v
        return self.o_proj(((y + own.flatten(-2)) * gate).to(gate.dtype))


def _orthogonal(weight: Tensor, gain: float) -> None:
    # In fp32: no other precision has a QR decomposition.
    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain))
