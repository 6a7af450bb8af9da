"""Chunked forms against the recurrences they compute, and against other people's references."""

import itertools

import pytest
import torch
from torch import Tensor

from slm.kernels.convolution import causal_convolution, causal_convolution_step, new_tail
from slm.kernels.delta_rule import chunk_delta_rule, delta_rule_step, recurrent_delta_rule
from slm.kernels.ssd import chunk_ssd, recurrent_ssd, ssd_step

B, H, K, V = 2, 3, 8, 6
LENGTHS = [1, 2, 63, 64, 65, 150]


def delta_rule_inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q = torch.randn(B, num_tokens, H, K, dtype=dtype)
    k = torch.nn.functional.normalize(torch.randn(B, num_tokens, H, K, dtype=dtype), dim=-1)
    v = torch.randn(B, num_tokens, H, V, dtype=dtype)
    beta = torch.rand(B, num_tokens, H, dtype=dtype)
    return [q, k, v, beta, torch.randn(B, H, K, V, dtype=dtype)]


def ssd_inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k = torch.randn(2, B, num_tokens, K, dtype=dtype)
    v = torch.randn(B, num_tokens, H, V, dtype=dtype)
    g = -torch.rand(B, num_tokens, H, dtype=dtype)
    return [q, k, v, g, torch.randn(B, H, K, V, dtype=dtype)]


RECURRENCES = {
    "delta_rule": (delta_rule_inputs, recurrent_delta_rule, chunk_delta_rule, delta_rule_step),
    "ssd": (ssd_inputs, recurrent_ssd, chunk_ssd, ssd_step),
}
recurrences = pytest.mark.parametrize("name", RECURRENCES)


@recurrences
@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("has_start", [True, False])
def test_chunked_equals_recurrent_with_all_gradients(
    name: str, num_tokens: int, chunk_size: int, has_start: bool
) -> None:
    make_inputs, recurrent, chunk, _ = RECURRENCES[name]
    inputs = [x.requires_grad_() for x in make_inputs(num_tokens)]
    if not has_start:
        inputs.pop()
    expected = recurrent(*inputs)
    actual = chunk(*inputs, chunk_size=chunk_size)
    weights = [torch.randn_like(x) for x in expected]

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(total, inputs)

    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(actual), gradients(expected), rtol=2e-4, atol=5e-5)


@recurrences
def test_gradcheck(name: str) -> None:
    make_inputs, _, chunk, _ = RECURRENCES[name]
    inputs = [x.requires_grad_() for x in make_inputs(5, torch.float64)]
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda *x: chunk(*x, documents, 2), inputs)


@recurrences
def test_steps_equal_recurrence(name: str) -> None:
    make_inputs, recurrent, _, step = RECURRENCES[name]
    *inputs, start = make_inputs(9)
    expected, final = recurrent(*inputs, start)
    state = start.clone()
    outputs = [step(*(x[:, t] for x in inputs), state) for t in range(9)]
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


@recurrences
@pytest.mark.parametrize("chunk_size", [4, 16, 64])
def test_every_document_begins_with_the_initial_state(name: str, chunk_size: int) -> None:
    make_inputs, recurrent, chunk, _ = RECURRENCES[name]
    *inputs, start = make_inputs(37)
    start = start[:1]
    cuts = [[0, 1, 4, 20, 37], [0, 15, 16, 17, 37]]
    documents = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(cut) - 1), torch.tensor(cut).diff())
            for cut in cuts
        ]
    )
    actual, final = chunk(*inputs, start, documents, chunk_size)
    for row, cut in enumerate(cuts):
        for begin, end in itertools.pairwise(cut):
            document = [x[row : row + 1, begin:end] for x in inputs]
            expected, last = recurrent(*document, start)
            torch.testing.assert_close(
                actual[row : row + 1, begin:end], expected, rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(final[row : row + 1], last, rtol=1e-4, atol=1e-5)


def test_half_precision_inputs_accumulate_in_fp32() -> None:
    inputs = [x.bfloat16() for x in delta_rule_inputs(70)]
    output, state = chunk_delta_rule(*inputs)
    expected, final = recurrent_delta_rule(*(x.float() for x in inputs))
    assert output.dtype == state.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_delta_rule_equals_flash_linear_attention() -> None:
    naive = pytest.importorskip("fla.ops.delta_rule.naive", reason="needs triton to import")
    q, k, v, beta, start = delta_rule_inputs(50)
    # fla's reference is head-first.
    head_first = [x.transpose(1, 2) for x in (q, k, v, beta)]
    expected, final = naive.delta_rule_recurrence(*head_first, start)
    actual, state = chunk_delta_rule(q, k, v, beta, start)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def test_ssd_equals_transformers() -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    q, k, _, _, start = ssd_inputs(50)
    x, dt, A = torch.randn(B, 50, H, V), torch.rand(B, 50, H), -torch.rand(H)
    expected, final = mamba2_chunk_scan(
        x,
        dt,
        A,
        k.unsqueeze(2),
        q.unsqueeze(2),
        chunk_size=16,
        initial_states=start.mT,
        return_final_states=True,
    )
    actual, state = chunk_ssd(q, k, x * dt.unsqueeze(-1), dt * A, start)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.mT, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_convolution_equals_torch_and_its_own_steps(width: int, has_bias: bool) -> None:
    x, weight, tail = torch.randn(B, 11, 5), torch.randn(5, width), torch.randn(B, width - 1, 5)
    bias = torch.randn(5) if has_bias else None
    module = torch.nn.Conv1d(5, 5, width, groups=5, padding=width - 1, bias=has_bias)
    module.weight.data = weight.unsqueeze(1)
    if bias is not None:
        module.bias.data = bias
    expected = module(x.mT)[..., :11].mT
    torch.testing.assert_close(causal_convolution(x, weight, bias, None), expected)

    with_tail = causal_convolution(x, weight, bias, tail)
    moving = tail.clone()
    steps = [causal_convolution_step(x[:, t], weight, bias, moving) for t in range(11)]
    torch.testing.assert_close(torch.stack(steps, 1), with_tail)
    torch.testing.assert_close(moving, new_tail(x, tail, width, None))


def test_convolution_of_packed_documents() -> None:
    x, weight, tail = torch.randn(1, 12, 5), torch.randn(5, 4), torch.randn(1, 3, 5)
    cuts = [0, 1, 3, 6, 12]
    ages = torch.cat([torch.arange(n) for n in torch.tensor(cuts).diff()])[None]
    packed = causal_convolution(x, weight, None, tail, ages)
    for begin, end in itertools.pairwise(cuts):
        alone = causal_convolution(x[:, begin:end], weight, None, tail)
        torch.testing.assert_close(packed[:, begin:end], alone)


def test_tail_of_padded_rows() -> None:
    x, tail = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    actual = new_tail(x, tail, 4, torch.tensor([1, 5]))
    torch.testing.assert_close(actual[:1], new_tail(x[:1, :1], tail[:1], 4, None))
    torch.testing.assert_close(actual[1:], new_tail(x[1:, :5], tail[1:], 4, None))
