"""Products of one token as sums, against the operations that they stand for."""

import zipfile

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_rms
from torch import Tensor

from slm.compilation import Argument, library, library_path
from slm.kernels.matrix_vector import KERNEL, LARGE_BYTES, batched_matmul, linear
from slm.runtime import thread_count

DTYPES = [torch.float64, torch.bfloat16]


def bound(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else 4e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 24), (1, 1, 24), (3, 24), (2, 3, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(10, 24, dtype=dtype)
    bias = torch.randn(10, dtype=dtype) if has_bias else None
    actual = linear(x, weight, bias)
    assert actual.dtype == dtype
    assert relative_rms(actual, F.linear(x, weight, bias)) < bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "o"), [(1, 5), (4, 1), (4, 5)])
def test_batched_matmul(t: int, o: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(3, t, 24, dtype=dtype), torch.randn(3, 24, o, dtype=dtype)
    assert relative_rms(batched_matmul(a, b), torch.bmm(a, b)) < bound(dtype)


# Of outputs and inputs, neither of them whole blocks of the kernel's; and a small one.
SHAPES = [(1501, 1003), (7, LARGE_BYTES // 13), (4099, 517), (10, 24)]


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one CPU")
def test_the_kernel_is_in_what_is_compiled(monkeypatch, tmp_path) -> None:
    """Of fp32 and bf16, on one thread and on two, against products in fp64."""
    monkeypatch.setenv("SLM_CACHE_DIR", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in SHAPES
    ]
    rows = [torch.randn(1, w.shape[1], generator=generator).to(w.dtype) for w in weights]

    def products(*tensors: Tensor) -> tuple[Tensor, ...]:
        half = len(tensors) // 2
        pairs = zip(tensors[:half], tensors[half:], strict=True)
        return tuple(F.linear(x, weight) for x, weight in pairs)

    arguments = [Argument(x) for x in (*rows, *weights)]
    for threads in (1, 2):
        with thread_count(threads), torch.inference_mode():
            results = library("products", products, arguments)([*rows, *weights])
            path = library_path("products", arguments)
        for x, weight, y in zip(rows, weights, results, strict=True):
            assert y.dtype == x.dtype
            rounding = 3e-8 * x.shape[1] ** 0.5 if x.dtype == torch.float32 else 4e-3
            assert relative_rms(y, x.double() @ weight.double().T) < rounding
        sources = "".join(
            archive.read(name).decode()
            for archive in [zipfile.ZipFile(path)]
            for name in archive.namelist()
            if name.endswith(".cpp")
        )
        # Once where it is, and once for each large matrix.
        name = "aoti_torch_cpu_matrix_vector("
        assert KERNEL.read_text().count(name) == 1
        assert sources.count(name) == 1 + 6
