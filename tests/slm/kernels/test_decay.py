"""Products that decay, against the sums they stand for; and systems against LAPACK."""

import math

import pytest
import torch
from numerics import relative_rms

from slm.kernels.decay import as_decay, between, decayed_products
from slm.kernels.triangular import invert_unit_lower, solve_unit_lower


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64])
def test_decayed_products_where_exponentials_alone_would_overflow(num_tokens: int) -> None:
    x, y = torch.randn(2, num_tokens, 3, 5), torch.randn(2, num_tokens, 2, 5)
    a = (-30 * torch.rand(2, num_tokens, 1, 5)).cumsum(1)
    expected = torch.einsum(
        "blrk,bmsk,blmk->blrms",
        *(t.double() for t in (x, y)),
        (a.double() - a.double().transpose(1, 2)).clamp(max=0).exp(),
    )
    later = torch.ones(num_tokens, num_tokens).tril(-1)[:, None, :, None]
    actual = decayed_products(x, a.expand_as(x), y, a)
    assert actual.isfinite().all()
    assert num_tokens == 1 or relative_rms(actual, expected * later) < 1e-5


def test_decay_between_tokens_where_exponentials_alone_would_overflow() -> None:
    a = (-30 * torch.rand(2, 64, 1)).cumsum(1)
    visible = torch.ones(64, 64, dtype=torch.bool).tril()
    visible[40:, :40] = False
    wide = a.double()
    expected = (wide - wide.mT).clamp(max=0).exp() * visible
    actual = between(a, visible)
    assert relative_rms(actual, expected) < 1e-5
    assert (actual[:, ~visible] == 0).all()


def test_no_decay_is_below_the_smallest_normal_number() -> None:
    log = torch.tensor([0.0, -1.0, -69.9, -70.1, -95.0, -1e4, -torch.inf])
    expected = torch.tensor([1.0, math.exp(-1), math.exp(-69.9), 0, 0, 0, 0])
    given = log.clone()
    torch.testing.assert_close(as_decay(log), expected, rtol=1e-5, atol=0)
    assert torch.equal(log, given)


def test_gradients_of_decayed_products() -> None:
    rows, columns = (torch.randn(8, n, 3, dtype=torch.double, requires_grad=True) for n in (2, 3))
    decay = (-torch.rand(8, 1, 3, dtype=torch.double)).requires_grad_()

    def decayed(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> object:
        a = g.cumsum(0)
        return decayed_products(x, torch.cat([a, a - g], dim=1), y, a)

    assert torch.autograd.gradcheck(decayed, (rows, columns, decay))


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_systems_equal_lapack(size: int) -> None:
    # As large as β k·k can be: keys that are all alike.
    A = torch.rand(7, size, size, dtype=torch.double)
    B = torch.randn(7, size, 5, dtype=torch.double)
    expected = torch.linalg.solve_triangular(A, B, upper=False, unitriangular=True)
    # What is on the diagonal and above it is not read.
    assert relative_rms(solve_unit_lower(A, B), expected) < 1e-12
    single = solve_unit_lower(torch.ones_like(A).float(), B.float())
    exact = torch.linalg.solve_triangular(torch.ones_like(A), B, upper=False, unitriangular=True)
    assert relative_rms(single, exact) < 1e-5
    identity = torch.eye(size, dtype=torch.double)
    product = invert_unit_lower(A) @ (A.tril(-1) + identity)
    assert (product - identity).abs().max() < 1e-9


def test_gradients_of_systems() -> None:
    A = torch.randn(2, 8, 8, dtype=torch.double, requires_grad=True)
    B = torch.randn(2, 8, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(solve_unit_lower, (A, B))
