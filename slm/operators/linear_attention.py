"""Linear attention: keys and queries pass a feature map, their values add up in a matrix.

Katharopoulos et al. 2020, "Transformers are RNNs"; without the normaliser, in whose place each
head's output is normed (Qin et al. 2022, "The Devil in Linear Transformer").

Letters: B rows, T tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.kernels.linear_attention import linear_attention, linear_attention_step
from slm.operators.base import (
    Operator,
    OperatorConfig,
    Recurrence,
    RecurrentState,
    Sequence,
    register,
)
from slm.operators.parts import RMSNorm, no_tail


@dataclass(frozen=True)
class LinearAttentionConfig(OperatorConfig):
    """Linear attention.

    head_dim: size of keys, queries and values; the model's width decides how many heads.
    feature_map: what queries and keys pass; 'elementwise_product' of two learned maps, or 'elu',
        elu(x) + 1.
    """

    name: ClassVar[str] = "linear_attention"
    short_name: ClassVar[str] = "LA"

    head_dim: int = 64
    feature_map: str = "elementwise_product"

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.head_dim < 1 or width % self.head_dim:
            found.append(
                f"linear_attention.head_dim: must divide the width {width}, got {self.head_dim}"
            )
        if self.feature_map not in ("elementwise_product", "elu"):
            found.append(
                "linear_attention.feature_map: must be 'elementwise_product' or 'elu', "
                f"got {self.feature_map!r}"
            )
        return found

    @property
    def is_learned(self) -> bool:
        """Whether the feature map has parameters."""
        return self.feature_map == "elementwise_product"

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        found = {"qkv_proj.weight": {"q": width, "k": width, "v": width}}
        if self.is_learned:
            maps = dict.fromkeys(("q_left", "q_right", "k_left", "k_right"), self.head_dim)
            found |= {"features.weight": maps, "features.bias": maps}
        return found

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        features = 4 * self.head_dim * (self.head_dim + 1) if self.is_learned else 0
        return 4 * width * width + features + self.head_dim

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, learned feature maps, and the recurrence: the state's write and read."""
        features = 8.0 * width * self.head_dim if self.is_learned else 0.0
        return 8.0 * width * width + features + 4.0 * width * self.head_dim

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """The recurrent state, always fp32."""
        return 4 * width * self.head_dim


@register(LinearAttentionConfig)
class LinearAttention(Operator):
    """Linear attention mixer; see `LinearAttentionConfig`."""

    reads = ("qkv_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v", "o_norm.weight")

    def __init__(self, config: LinearAttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.features: Callable[[Tensor], Tensor] = (
            ElementwiseProduct(config.head_dim) if config.is_learned else _elu_plus_one
        )
        self.o_norm = RMSNorm(config.head_dim, eps=1e-5)
        self.o_proj = nn.Linear(width, width, bias=False)

    def scan(
        self, x: Tensor, sequence: Sequence, start: Recurrence | None
    ) -> tuple[Tensor, Recurrence]:
        """See `Operator.scan`."""
        q, k, v = self._project(x)
        is_real = sequence.is_real(x.shape[1])
        if is_real is not None:
            k = k * is_real[..., None, None]
        matrix = None if start is None else start.matrix
        y, matrix = linear_attention(q, k, v, matrix, sequence.documents)
        return self._output(y, x.dtype), Recurrence(matrix, no_tail(matrix))

    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """See `Operator.step`."""
        q, k, v = self._project(x)
        y = linear_attention_step(q, k, v, state.matrix)
        return self._output(y, x.dtype)

    def init_state(self, batch_size: int, max_tokens: int) -> RecurrentState:
        """Zeros: a state [B, H, K, K] in fp32."""
        size = self.config.head_dim
        matrix = self.o_proj.weight.new_zeros(
            (batch_size, self.num_heads, size, size), dtype=torch.float32
        )
        return RecurrentState(matrix, no_tail(matrix))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of q and k, and v [..., H, K]."""
        qk, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=-3)
        q, k = self.features(qk).unbind(-3)
        return q, k, v.squeeze(-3)

    def _output(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Norm of each head and projection of y [..., H, K]."""
        return self.o_proj(self.o_norm(y).to(dtype).flatten(-2))


class ElementwiseProduct(nn.Module):
    """φ(x) = (W₁ x + b₁) ⊙ (W₂ x + b₂), with its own weights for queries and for keys.

    All heads share them. Below each other stand W₁, W₂ of queries, then W₁, W₂ of keys.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4 * head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(4 * head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±1 / √K: at the 0.02 of projections the product would all but vanish."""
        bound = self.weight.shape[-1] ** -0.5
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, qk: Tensor) -> Tensor:
        """Features [..., 2, H, K] of queries and keys [..., 2, H, K]."""
        weight, bias = self.weight.unflatten(0, (2, -1)), self.bias.unflatten(0, (2, 1, -1))
        left, right = (torch.einsum("...shk,sjk->...shj", qk, weight) + bias).chunk(2, dim=-1)
        return left * right


def _elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1.0
