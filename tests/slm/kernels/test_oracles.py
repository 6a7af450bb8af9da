"""The chunked forms against references that others wrote: fla's naive functions, transformers'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
from numerics import relative_rms
from recurrences import RECURRENCES, make_inputs, with_gradients
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

T = 75
Results = tuple[Tensor, Tensor]


def head_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Results:
    o, final = delta_rule_recurrence(*head_first(q, k, v, beta), state)
    return o.transpose(1, 2), final


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Results:
    return naive_recurrent_gated_delta_rule(
        q, k, v, beta, g, initial_state=state, output_final_state=True
    )


def kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Results:
    return naive_recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True)


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Results:
    return naive_recurrent_gla(q, k, v, g, initial_state=state, output_final_state=True)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Results:
    return naive_recurrent_linear_attn(q, k, v, initial_state=state, output_final_state=True)


def rwkv7(*inputs: Tensor) -> Results:
    *tokens, state = inputs
    r, w, k, v, a, b = head_first(*tokens)
    # Its queries are scaled, those of RWKV-7 are not.
    o, final = dplr_recurrence(r * r.shape[-1] ** 0.5, k, v, a, b, w, initial_state=state)
    return o.transpose(1, 2), final


def simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Results:
    q, k = (x.unsqueeze(2).expand(-1, -1, v.shape[2], -1) for x in (q, k))
    return naive_recurrent_simple_gla(
        q, k, v, g, scale=1.0, initial_state=state, output_final_state=True
    )


def mamba2(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Results:
    # Their decay is Δ A, and their values Δ x: with A = −1, Δ = −g and x = v / Δ.
    o, final = mamba2_chunk_scan(
        v / -g.unsqueeze(-1),
        -g,
        -torch.ones(v.shape[2], dtype=v.dtype),
        k.unsqueeze(2),
        q.unsqueeze(2),
        chunk_size=16,
        initial_states=state.mT,
        return_final_states=True,
    )
    return o, final.mT


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Results:
    y, final = mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, return_last_state=True)
    return y.mT, final


ORACLES: list[tuple[str, Callable[..., Results]]] = [
    ("delta_rule", delta_rule),
    ("gated_delta_rule", gated_delta_rule),
    ("kda", kda),
    ("gla", gla),
    ("linear_attention", linear_attention),
    ("rwkv7", rwkv7),
    ("ssd", simple_gla),
    ("ssd", mamba2),
    ("selective_scan", selective_scan),
]


@pytest.mark.parametrize(("name", "oracle"), ORACLES)
def test_output_state_and_gradients(name: str, oracle: Callable[..., Results]) -> None:
    recurrence = RECURRENCES[name]
    inputs = make_inputs(recurrence, T, torch.float32)
    names = list(recurrence.names)
    if name == "selective_scan":
        # Theirs begins with nothing.
        inputs.pop()
        names.pop()
    weights: Any = tuple(torch.randn_like(x) for x in recurrence.chunk(*inputs))
    actual = with_gradients(recurrence.chunk, inputs, weights)
    expected = with_gradients(oracle, inputs, weights)
    names = ["output", "final state", *(f"gradient of {each}" for each in names)]
    for what, ours, theirs in zip(names, actual, expected, strict=True):
        assert relative_rms(ours, theirs) < 2e-5, what
