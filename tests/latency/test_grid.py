import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latency.grid import Part, contexts, operator_parts, parts
from latency.request import BURST_STEPS
from latency.workload import Workload
from slm.operators import parse_operator
from slm.operators.attention import PLACES_BLOCK

WORKLOADS = st.builds(Workload, prompt_tokens=st.integers(1, 2000), new_tokens=st.integers(2, 2000))
META_TOKENS = st.integers(0, 300)


def seen(workload: Workload, meta_tokens: int) -> np.ndarray:
    """Tokens that each decoding step after the first sees, one after the other."""
    first = meta_tokens + workload.prompt_tokens + 2
    return np.arange(first, first + workload.new_tokens - 2)


@given(WORKLOADS, META_TOKENS)
def test_every_step_of_a_request_is_counted(workload, meta_tokens):
    found = parts(workload, meta_tokens)
    prompt = Part("prompt", workload.prompt_tokens)
    # The first step is the prompt's.
    assert found.pop(prompt) == 1
    assert sum(found.values()) == pytest.approx(workload.new_tokens - 2)
    assert all(times > 0 for times in found.values())


@given(WORKLOADS, META_TOKENS)
def test_a_cost_that_grows_by_blocks_is_integrated_exactly(workload, meta_tokens):
    """Of attention: a constant and so much for each block of places that a step reads."""
    found = parts(workload, meta_tokens)
    blocks = np.ceil(seen(workload, meta_tokens) / PLACES_BLOCK)
    least = contexts(0, meta_tokens)[0].tokens / PLACES_BLOCK
    expected = np.maximum(blocks, least).sum()
    del found[Part("prompt", workload.prompt_tokens)]
    integral = sum(times * part.tokens / PLACES_BLOCK for part, times in found.items())
    assert integral == pytest.approx(expected)


@given(WORKLOADS, META_TOKENS)
def test_bursts_lie_within_the_blocks_that_they_stand_for(workload, meta_tokens):
    for part in parts(workload, meta_tokens):
        if part.kind == "context":
            first, last = part.steps(meta_tokens)
            assert first >= 0
            # One that is not timed comes before it.
            assert last - max(first, 1) >= BURST_STEPS
            # The first step of a burst sees its own token, too.
            assert meta_tokens + first + 1 > part.tokens - PLACES_BLOCK
            assert meta_tokens + last <= part.tokens


@given(st.integers(1, 100_000), META_TOKENS)
def test_contexts_double_and_are_shared_by_all_lengths(most, meta_tokens):
    found = [part.tokens for part in contexts(most, meta_tokens)]
    assert found[-1] >= most
    assert found == [part.tokens for part in contexts(2 * most, meta_tokens)][: len(found)]
    blocks = [tokens // PLACES_BLOCK for tokens in found]
    assert all(block & (block - 1) == 0 for block in blocks[1:])
    assert blocks == sorted(set(blocks))


@pytest.mark.parametrize("text", ["ffn", "mamba2", "deltanet(head_dim=32)"])
def test_what_does_not_grow_with_the_context_has_one(text):
    workload = Workload(prompt_tokens=100, new_tokens=8000)
    found = operator_parts(parse_operator(text), 64, workload, meta_tokens=8)
    assert found == {Part("prompt", 100): 1.0, Part("context", 64): pytest.approx(7998)}


def test_attention_has_all_contexts_and_a_window_those_that_it_grows_through():
    workload = Workload(prompt_tokens=100, new_tokens=900)
    whole = parse_operator("attention(head_dim=32)")
    assert operator_parts(whole, 64, workload, 8) == parts(workload, 8)
    assert {part.tokens for part in parts(workload, 8)} == {100, 64 * 2, 64 * 4, 64 * 8, 64 * 16}
    window = parse_operator("attention(head_dim=32,window=100)")
    found = operator_parts(window, 64, workload, 8)
    assert {part.tokens for part in found} == {100, 128, 256}
    assert sum(found.values()) == pytest.approx(1 + 898)
