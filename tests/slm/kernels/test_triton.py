"""flash-linear-attention's own kernels, run by Triton's interpreter, against the chunked forms.

What this checks is how they are called: the order of arguments, layouts, scales, dtypes, documents.
"""

from collections.abc import Iterator

import pytest
import torch
from numerics import relative_rms
from recurrences import RECURRENCES, make_inputs, with_gradients
from torch import Tensor
from triton_interpreter import LAST, Interpreter

from slm.kernels.convolution import fla_causal_convolution, torch_causal_convolution
from slm.kernels.documents import Documents

WITH_KERNEL = [name for name, each in RECURRENCES.items() if each.fla is not None]
kernels = pytest.mark.parametrize("name", WITH_KERNEL)
# Tokens: an odd number, over one chunk of the kernels. Sizes: powers of two.
T, SIZES = 75, {"batch_size": 1, "num_heads": 2, "key_size": 16, "value_size": 16}


@pytest.fixture(scope="module")
def last_tiling() -> Iterator[Interpreter]:
    interpreter = Interpreter(LAST)
    yield interpreter
    interpreter.close()


def run_kernel(
    name: str, inputs: list[Tensor], weights: tuple[Tensor, ...], documents: Documents | None
) -> list[Tensor]:
    """What the kernel gives, with every gradient; runs where the interpreter is."""
    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    fla = RECURRENCES[name].fla
    assert fla is not None
    return with_gradients(fla, inputs, weights, documents=documents)


def assert_agree(
    interpreter: Interpreter,
    name: str,
    dtype: torch.dtype,
    documents: Documents | None,
    tolerance: float,
) -> None:
    recurrence = RECURRENCES[name]
    batch_size = 1 if documents is None else len(documents.begins)
    inputs = make_inputs(recurrence, T, dtype, **{**SIZES, "batch_size": batch_size})
    weights = tuple(torch.randn_like(x) for x in recurrence.chunk(*inputs, documents=documents))
    actual = interpreter.run(run_kernel, name, inputs, weights, documents)
    wide = [x.float() for x in inputs]
    expected = with_gradients(recurrence.chunk, wide, weights, documents=documents)
    names = ["output", "final state", *(f"gradient of {each}" for each in recurrence.names)]
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for what, theirs, ours in zip(names, actual, expected, strict=True):
        assert relative_rms(theirs, ours) < tolerance, what


@kernels
def test_fp32(interpreter: Interpreter, name: str) -> None:
    assert_agree(interpreter, name, torch.float32, None, 1e-5)


@kernels
def test_another_tiling(last_tiling: Interpreter, name: str) -> None:
    assert_agree(last_tiling, name, torch.float32, None, 1e-5)


@kernels
def test_bf16(interpreter: Interpreter, name: str) -> None:
    assert_agree(interpreter, name, torch.bfloat16, None, 8e-3)


@kernels
def test_documents(interpreter: Interpreter, name: str) -> None:
    begins = torch.zeros(2, T, dtype=torch.bool)
    begins[:, 0] = begins[0, [1, 30]] = begins[1, 64] = True
    assert_agree(interpreter, name, torch.float32, Documents(begins), 1e-5)


def run_convolution(
    inputs: list[Tensor], weight: Tensor, documents: Documents | None
) -> list[Tensor]:
    """As `run_kernel`, of the short convolution."""
    torch.use_deterministic_algorithms(True)

    def convolve(*tensors: Tensor) -> tuple[Tensor]:
        return (fla_causal_convolution(*tensors, documents),)

    return with_gradients(convolve, inputs, (weight,))


@pytest.mark.parametrize("has_documents", [True, False])
@pytest.mark.parametrize("width", [3, 4])
def test_convolution(interpreter: Interpreter, width: int, has_documents: bool) -> None:
    x, weight = torch.randn(2, T, 6), torch.randn(2, T, 6)
    inputs = [x, torch.randn(6, width), torch.randn(6), torch.randn(2, width - 1, 6)]
    begins = torch.zeros(2, T, dtype=torch.bool)
    begins[:, 0] = begins[0, [1, 3, 33]] = begins[1, [64, 69, 70]] = True
    documents = Documents(begins) if has_documents else None

    def convolve(*tensors: Tensor) -> tuple[Tensor]:
        return (torch_causal_convolution(*tensors, documents),)

    actual = interpreter.run(run_convolution, inputs, weight, documents)
    expected = with_gradients(convolve, inputs, (weight,))
    names = ["output", *(f"gradient of {name}" for name in ("x", "weight", "bias", "tail"))]
    for what, theirs, ours in zip(names, actual, expected, strict=True):
        assert relative_rms(theirs, ours) < 1e-6, what
