"""Every recurrence with its forms, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slm.kernels.delta_rule import (
    chunk_delta_rule,
    delta_rule_step,
    fla_delta_rule,
    recurrent_delta_rule,
)
from slm.kernels.gated_delta_rule import (
    chunk_gated_delta_rule,
    fla_gated_delta_rule,
    gated_delta_rule_step,
    recurrent_gated_delta_rule,
)
from slm.kernels.gla import chunk_gla, fla_gla, gla_step, recurrent_gla
from slm.kernels.kda import chunk_kda, fla_kda, kda_step, recurrent_kda
from slm.kernels.linear_attention import (
    chunk_linear_attention,
    fla_linear_attention,
    linear_attention_step,
    recurrent_linear_attention,
)
from slm.kernels.rwkv7 import chunk_rwkv7, fla_rwkv7, recurrent_rwkv7, rwkv7_step
from slm.kernels.selective_scan import (
    chunk_selective_scan,
    recurrent_selective_scan,
    selective_scan_step,
)
from slm.kernels.ssd import chunk_ssd, fla_ssd, recurrent_ssd, ssd_step

Forms = Callable[..., Any]


@dataclass(frozen=True)
class Recurrence:
    """The forms of one recurrence.

    inputs: names of what it takes, see `make_inputs`; A is the only one without tokens.
    fla: None where it has no such kernel.
    """

    inputs: str
    recurrent: Forms
    chunk: Forms
    step: Forms
    fla: Forms | None

    @property
    def names(self) -> list[str]:
        """The inputs, the initial state last."""
        return [*self.inputs.split(), "hidden" if "x" in self.inputs.split() else "state"]

    def token(self, inputs: list[Tensor], t: int) -> list[Tensor]:
        """The inputs of one token."""
        pairs = zip(self.inputs.split(), inputs, strict=True)
        return [x if name == "A" else x[:, t] for name, x in pairs]

    def document(self, inputs: list[Tensor], row: int, begin: int, end: int) -> list[Tensor]:
        """The inputs of some tokens of one row."""
        pairs = zip(self.inputs.split(), inputs, strict=True)
        return [x if name == "A" else x[row : row + 1, begin:end] for name, x in pairs]


RECURRENCES = {
    "delta_rule": Recurrence(
        "q unit_k v beta",
        recurrent_delta_rule,
        chunk_delta_rule,
        delta_rule_step,
        fla_delta_rule,
    ),
    "gated_delta_rule": Recurrence(
        "q unit_k v g beta",
        recurrent_gated_delta_rule,
        chunk_gated_delta_rule,
        gated_delta_rule_step,
        fla_gated_delta_rule,
    ),
    "kda": Recurrence("q unit_k v gk beta", recurrent_kda, chunk_kda, kda_step, fla_kda),
    "gla": Recurrence("q k v gk", recurrent_gla, chunk_gla, gla_step, fla_gla),
    "linear_attention": Recurrence(
        "q k v",
        recurrent_linear_attention,
        chunk_linear_attention,
        linear_attention_step,
        fla_linear_attention,
    ),
    "rwkv7": Recurrence(
        "q w k v minus_unit_k b", recurrent_rwkv7, chunk_rwkv7, rwkv7_step, fla_rwkv7
    ),
    "ssd": Recurrence("C B v g", recurrent_ssd, chunk_ssd, ssd_step, fla_ssd),
    "selective_scan": Recurrence(
        "x dt A B C", recurrent_selective_scan, chunk_selective_scan, selective_scan_step, None
    ),
}


def make_inputs(
    recurrence: Recurrence,
    num_tokens: int,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 2,
    num_heads: int = 3,
    key_size: int = 8,
    value_size: int = 6,
) -> list[Tensor]:
    """Random inputs and, last, an initial state; some channels forget within a few tokens."""
    B, T, H, K, V = batch_size, num_tokens, num_heads, key_size, value_size
    unit_k = F.normalize(torch.randn(B, T, H, K), dim=-1)
    beta = torch.rand(B, T, H)
    made = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "unit_k": unit_k,
        "minus_unit_k": -unit_k,
        "b": unit_k * beta.unsqueeze(-1),
        "beta": beta,
        "g": -0.05 - 2 * torch.rand(B, T, H),
        # From next to nothing to 20: what is left after two tokens is below fp32's smallest.
        "gk": -20 * torch.rand(B, T, H, K).pow(4),
        # The decays of RWKV-7 are no stronger than this.
        "w": -0.606 * torch.rand(B, T, H, K),
        "state": torch.randn(B, H, K, V),
        "x": torch.randn(B, T, H * V),
        "dt": torch.rand(B, T, H * V),
        "A": -20 * torch.rand(H * V, K),
        "B": torch.randn(B, T, K),
        "C": torch.randn(B, T, K),
        "hidden": torch.randn(B, H * V, K),
    }
    return [made[name].to(dtype) for name in recurrence.names]


def with_gradients(
    function: Forms, inputs: list[Tensor], weights: tuple[Tensor, ...], **options: Any
) -> list[Tensor]:
    """Output, final state, and every input's gradient of their sum weighted by `weights`."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = function(*inputs, **options)
    total = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
    return [x.detach() for x in (*results, *torch.autograd.grad(total, inputs))]
