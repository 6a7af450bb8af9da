"""Every recurrence: its chunked form and its step against the plain statement of it."""

import itertools

import pytest
import torch
from numerics import relative_rms
from recurrences import RECURRENCES, Recurrence, make_inputs, with_gradients
from torch import Tensor

from slm.kernels.documents import Documents

LENGTHS = [1, 2, 63, 64, 65, 150]
EXACT = 1e-11  # fp64: rounding only


@pytest.fixture(params=RECURRENCES)
def recurrence(request: pytest.FixtureRequest) -> Recurrence:
    return RECURRENCES[request.param]


def names_of_results(recurrence: Recurrence, has_start: bool = True) -> list[str]:
    inputs = recurrence.names if has_start else recurrence.names[:-1]
    return ["output", "final state", *(f"gradient of {name}" for name in inputs)]


def make_weights(recurrence: Recurrence, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(x) for x in recurrence.recurrent(*inputs))


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("has_start", [True, False], ids=["start", "no start"])
def test_chunks_equal_recurrence_with_every_gradient(
    recurrence: Recurrence, num_tokens: int, has_start: bool
) -> None:
    inputs = make_inputs(recurrence, num_tokens)[: None if has_start else -1]
    weights = make_weights(recurrence, inputs)
    expected = with_gradients(recurrence.recurrent, inputs, weights)
    for chunk_size in (16, 64, 256):
        actual = with_gradients(recurrence.chunk, inputs, weights, chunk_size=chunk_size)
        names = names_of_results(recurrence, has_start)
        for name, ours, truth in zip(names, actual, expected, strict=True):
            assert relative_rms(ours, truth) < EXACT, f"{name}, chunks of {chunk_size}"


def test_chunks_in_fp32_stay_close_to_the_truth(recurrence: Recurrence) -> None:
    inputs = make_inputs(recurrence, 150)
    weights = make_weights(recurrence, inputs)
    truth = with_gradients(recurrence.recurrent, inputs, weights)
    single = [x.float() for x in inputs], tuple(w.float() for w in weights)
    chunked = with_gradients(recurrence.chunk, *single)
    for name, ours, exact in zip(names_of_results(recurrence), chunked, truth, strict=True):
        assert ours.dtype == torch.float32
        assert relative_rms(ours, exact) < 1e-5, name


def test_gradcheck(recurrence: Recurrence) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(recurrence, 5, num_heads=2, key_size=4)]
    documents = Documents.from_ids(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return recurrence.chunk(*tensors, documents, 2)

    assert torch.autograd.gradcheck(run, inputs)


def test_steps_equal_recurrence(recurrence: Recurrence) -> None:
    *inputs, start = make_inputs(recurrence, 9)
    expected, final = recurrence.recurrent(*inputs, start)
    state = start.clone()
    address = state.data_ptr()
    outputs = [recurrence.step(*recurrence.token(inputs, t), state) for t in range(9)]
    assert relative_rms(torch.stack(outputs, 1), expected) < EXACT
    assert relative_rms(state, final) < EXACT
    assert state.data_ptr() == address


@pytest.mark.parametrize("chunk_size", [4, 16, 64])
def test_every_document_begins_with_the_initial_state(
    recurrence: Recurrence, chunk_size: int
) -> None:
    *inputs, start = make_inputs(recurrence, 37)
    start = start[:1]
    cuts = [[0, 1, 4, 20, 37], [0, 15, 16, 17, 37]]
    begins = torch.zeros(2, 37, dtype=torch.bool)
    for row, cut in enumerate(cuts):
        begins[row, cut[:-1]] = True
    documents = Documents(begins)
    actual, final = recurrence.chunk(*inputs, start, documents, chunk_size)
    for row, cut in enumerate(cuts):
        for begin, end in itertools.pairwise(cut):
            document = recurrence.document(inputs, row, begin, end)
            expected, last = recurrence.recurrent(*document, start)
            assert relative_rms(actual[row : row + 1, begin:end], expected) < EXACT
        assert relative_rms(final[row : row + 1], last) < EXACT


def test_half_precision_is_computed_in_fp32_also_under_autocast(recurrence: Recurrence) -> None:
    *inputs, start = make_inputs(recurrence, 70, torch.bfloat16)
    start = start.float()
    expected, final = recurrence.recurrent(*(x.double() for x in inputs), start.double())
    with torch.autocast("cpu", torch.bfloat16):
        chunked = recurrence.chunk(*inputs, start)
        token_by_token = recurrence.recurrent(*inputs, start)
        state = start.clone()
        steps = [recurrence.step(*recurrence.token(inputs, t), state) for t in range(70)]
    for output, last in (chunked, token_by_token, (torch.stack(steps, 1), state)):
        assert output.dtype == last.dtype == torch.float32
        assert relative_rms(output, expected) < 3e-6
        assert relative_rms(last, final) < 3e-6


def test_the_future_does_not_matter(recurrence: Recurrence) -> None:
    *inputs, start = make_inputs(recurrence, 40)
    before, _ = recurrence.chunk(*inputs, start, chunk_size=16)
    for name, x in zip(recurrence.inputs.split(), inputs, strict=True):
        if name != "A":
            x[:, 21:] *= 0.5
    after, _ = recurrence.chunk(*inputs, start, chunk_size=16)
    assert torch.equal(after[:, :21], before[:, :21])
    assert not torch.equal(after[:, 21:], before[:, 21:])


def test_the_selective_scan_compiles_whole() -> None:
    """As it is on CUDA; one that Dynamo cannot see through would run piece by piece, or not."""
    recurrence = RECURRENCES["selective_scan"]
    inputs = make_inputs(recurrence, 11)
    weights = make_weights(recurrence, inputs)
    documents = Documents.from_ids(torch.tensor([[0] * 11, [0] * 6 + [1] * 5]))
    options = {"documents": documents, "chunk_size": 4}
    expected = with_gradients(recurrence.chunk, inputs, weights, **options)
    torch._dynamo.reset()
    compiled = torch.compile(recurrence.chunk, fullgraph=True)
    actual = with_gradients(compiled, inputs, weights, **options)
    for name, ours, truth in zip(names_of_results(recurrence), actual, expected, strict=True):
        assert relative_rms(ours, truth) < EXACT, name
