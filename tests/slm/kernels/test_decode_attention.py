"""The decoding attention of CUDA, run by Triton's interpreter, against torch in fp64."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_rms
from torch import Tensor
from triton_interpreter import FIRST, Interpreter

N = 150


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    interpreter = Interpreter(FIRST)
    yield interpreter
    interpreter.close()


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, shares: int) -> Tensor:
    """Runs where the interpreter is."""
    from slm.kernels.triton.decode_attention import attend_shares

    torch.use_deterministic_algorithms(True)  # fills memory that nobody wrote with NaN
    return attend_shares(q, k, v, lengths, shares)


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 16), (6, 2, 24), (20, 1, 32)])
def test_it_equals_torch(
    interpreter: Interpreter, heads: int, groups: int, size: int, shares: int
) -> None:
    q = torch.randn(4, heads, size)
    # Places first in memory, as caches have them.
    k, v = torch.randn(2, N, 4, groups, size).transpose(1, 2)
    lengths = torch.tensor([1, 64, 97, N + 3])
    mask = (torch.arange(N) < lengths[:, None])[:, None, None]
    expected = F.scaled_dot_product_attention(
        q.double().unsqueeze(2),
        k.double().transpose(1, 2),
        v.double().transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    ).squeeze(2)
    # A copy: what crosses to another process loses its strides.
    actual = interpreter.run(attend_places_first, q, k, v, lengths, shares)
    assert relative_rms(actual, expected) < 1e-6


def attend_places_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, shares: int) -> Tensor:
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    return attend(q, k, v, lengths, shares)
