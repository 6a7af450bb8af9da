"""Windowed attention by blocks against a softmax over masks written from their definition."""

import itertools

import pytest
import torch
from numerics import LargestTensor, relative_rms
from torch import Tensor

from slm.kernels.attention import (
    Keys,
    attention_after,
    attention_by_document,
    masked_attention,
    rotate,
)
from slm.kernels.documents import Documents

B, T, H, G, K = 2, 50, 4, 2, 8
NUM_BEFORE = 6
CUTS = [[0, 1, 14, 40, T], [0, 22, 23, 45, T]]


def tensors(num_tokens: int, batch_size: int = B) -> tuple[Tensor, Tensor]:
    """Keys and values that record their gradients."""
    shape = (batch_size, num_tokens, G, K)
    k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return k, v


def visible(window: int, num_pinned: int, num_before: int, cuts: list[list[int]]) -> Tensor:
    """[B, T, N + T] bool, token by token: the own document, causal, in the window or pinned."""
    mask = torch.zeros(B, T, num_before + T, dtype=torch.bool)
    for row, cut in enumerate(cuts):
        for begin, end in itertools.pairwise(cut):
            columns = [*range(num_before), *range(num_before + begin, num_before + end)]
            for query, place in enumerate(range(begin, end), start=num_before):
                for key, column in enumerate(columns[: query + 1]):
                    mask[row, place, column] = query - key < window or key < num_pinned
    return mask


@pytest.mark.parametrize("has_documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("num_before", [0, NUM_BEFORE])
@pytest.mark.parametrize("num_pinned", [0, 4, NUM_BEFORE, 9])
@pytest.mark.parametrize(("window", "block_size"), [(1, 1), (5, 1), (5, 16), (5, T), (33, 1)])
def test_blocks_equal_a_dense_softmax(
    window: int, block_size: int, num_pinned: int, num_before: int, has_documents: bool
) -> None:
    q = torch.randn(B, T, H, K, dtype=torch.float64, requires_grad=True)
    k, v = tensors(T)
    k_before, v_before = tensors(num_before, batch_size=1)
    cuts = CUTS if has_documents else [[0, T]] * B
    lengths = [torch.tensor(cut).diff() for cut in cuts]
    ages = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)), n) for n in lengths])
    new = Keys(k, v, num_before + ages, documents if has_documents else None)
    before = Keys(k_before, v_before, torch.arange(num_before)[None]) if num_before else None
    actual = masked_attention(q, new, before, window, num_pinned, num_before, block_size)

    keys, values = (
        torch.cat([x.expand(B, -1, -1, -1), y], dim=1).repeat_interleave(H // G, dim=2)
        for x, y in ((k_before, k), (v_before, v))
    )
    scores = torch.einsum("bthk,bnhk->bhtn", q, keys) * K**-0.5
    mask = visible(window, num_pinned, num_before, cuts).unsqueeze(1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("bhtn,bnhk->bthk", weights, values)

    assert relative_rms(actual, expected) < 1e-14
    leaves = [q, k, v, k_before, v_before] if num_before else [q, k, v]
    outputs = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, outputs),
        torch.autograd.grad(expected, leaves, outputs),
        strict=True,
    ):
        # Not by the size of the gradient: that of a key which is seen alone is zero.
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_documents", [False, True], ids=["rows", "documents"])
def test_memory_does_not_grow_with_the_square_of_the_row(has_documents: bool) -> None:
    num_tokens, window = 4096, 64
    x = torch.randn(1, num_tokens, 1, 4)
    place = torch.arange(num_tokens)[None]
    documents = place // 1000 if has_documents else None
    new = Keys(x, x, place % 1000 if has_documents else place, documents)
    with LargestTensor() as largest:
        masked_attention(x, new, None, window, num_pinned=8)
    assert largest.num_values <= 128 * (window + 128 + 8)


@pytest.mark.parametrize("num_before", [0, NUM_BEFORE])
@pytest.mark.parametrize("has_documents", [False, True], ids=["rows", "documents"])
def test_causal_attention_after_what_all_see(num_before: int, has_documents: bool) -> None:
    """Without a mask, against the same with one."""
    q = torch.randn(B, T, H, K, dtype=torch.float64, requires_grad=True)
    k, v = tensors(T)
    leaves, before = [q, k, v], None
    if num_before:
        pair = tensors(num_before, batch_size=1)
        before = Keys(*pair, torch.arange(num_before)[None])
        leaves += pair
    begins = torch.zeros(B, T, dtype=torch.bool)
    for row, cut in enumerate(CUTS):
        begins[row, cut[:-1] if has_documents else 0] = True
    documents = Documents(begins)
    new = Keys(k, v, num_before + documents.ages, documents.numbers)
    expected = masked_attention(q, new, before, window=None)
    if has_documents:
        actual = attention_by_document(q, k, v, documents, before)
    else:
        actual = attention_after(q, k, v, before)
    assert relative_rms(actual, expected) < 1e-14
    outputs = torch.randn_like(expected)
    for ours, masked in zip(
        torch.autograd.grad(actual, leaves, outputs),
        torch.autograd.grad(expected, leaves, outputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, masked, rtol=1e-12, atol=1e-12)


def test_rotation_is_a_product_of_complex_numbers_and_its_gradient_turns_back() -> None:
    x = torch.randn(2, 7, 3, K, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 100, 4095, 7]])
    angles = positions[..., None, None] * 1e4 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    numbers = torch.complex(*x.detach().chunk(2, dim=-1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    expected = torch.cat([numbers.real, numbers.imag], dim=-1)
    with torch.no_grad():
        alone = rotate(x, positions, 1e4)
    turned = rotate(x, positions, 1e4)
    for actual in (alone, turned):
        # Frequencies are fp32.
        assert relative_rms(actual, expected) < 1e-5
    assert relative_rms(turned, alone) < 1e-15
    (back,) = torch.autograd.grad(turned, x, turned.detach())
    assert relative_rms(back, x) < 1e-7
    assert torch.autograd.gradcheck(lambda x: rotate(x, positions, 1e4), (x,))
    half = x.detach().bfloat16().requires_grad_()
    turned = rotate(half, positions, 1e4)
    assert turned.dtype == torch.bfloat16
    assert relative_rms(turned, expected) < 4e-3
    (back,) = torch.autograd.grad(turned, half, turned.detach())
    assert back.dtype == torch.bfloat16
    assert relative_rms(back, x) < 6e-3
