"""The loss of a linear head by chunks: against torch's, of the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from numerics import LargestTensor, relative_rms
from torch import Tensor
from triton_interpreter import Interpreter

from slm.kernels.cross_entropy import (
    CHUNK_TOKENS,
    chunk_linear_cross_entropy,
    fla_linear_cross_entropy,
    linear_cross_entropy,
)

N, D, V = 37, 16, 50


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,))


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


@pytest.mark.parametrize(
    ("chunk_tokens", "block_tokens"), [(1, 1), (8, 3), (37, 37), (CHUNK_TOKENS, None)]
)
def test_loss_and_gradients(chunk_tokens: int, block_tokens: int | None) -> None:
    hidden, weight, targets = make_inputs()
    loss = chunk_linear_cross_entropy(hidden, weight, targets, chunk_tokens, block_tokens)
    expected = whole(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    # What comes after the loss scales the gradients, which are known before.
    actual = torch.autograd.grad((3 * loss).square(), (hidden, weight))
    for ours, torchs in zip(
        actual, torch.autograd.grad((3 * expected).square(), (hidden, weight)), strict=True
    ):
        assert relative_rms(ours, torchs) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [3, CHUNK_TOKENS])
def test_gradients_in_double_precision(chunk_tokens: int) -> None:
    hidden, weight, _ = (x[:7] for x in make_inputs(torch.float64))
    targets = torch.tensor([0, 6, 3, 3, 1, 2, 5])

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunk_linear_cross_entropy(hidden, weight, targets, chunk_tokens, block_tokens=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_logits_over_the_norms_of_rows() -> None:
    """Against cosines, the weight's gradient going through the norms, too."""
    hidden, weight, targets = make_inputs(torch.float64)
    loss = linear_cross_entropy(hidden, weight, weight.norm(dim=-1), targets)
    cosines = F.cosine_similarity(hidden[:, None], weight, dim=-1)
    expected = F.cross_entropy(cosines * hidden.norm(dim=-1, keepdim=True), targets)
    torch.testing.assert_close(loss, expected)
    actual = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(actual, torch.autograd.grad(expected, (hidden, weight)))


def test_only_what_is_asked_for_has_gradients() -> None:
    hidden, weight, targets = make_inputs()
    expected = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    (d_hidden,) = torch.autograd.grad(
        chunk_linear_cross_entropy(hidden, weight.detach(), targets), (hidden,)
    )
    (d_weight,) = torch.autograd.grad(
        chunk_linear_cross_entropy(hidden.detach(), weight, targets), (weight,)
    )
    assert relative_rms(d_hidden, expected[0]) < 1e-6
    assert relative_rms(d_weight, expected[1]) < 1e-6
    with torch.no_grad():
        assert not chunk_linear_cross_entropy(hidden, weight, targets).requires_grad


def test_autocast() -> None:
    """Products in bfloat16, all else in fp32: as close to fp32 as torch's own autocast."""
    hidden, weight, targets = make_inputs()
    exact = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    errors = {}
    for name, function in (("ours", linear_cross_entropy), ("torch", whole)):
        arguments = (None, targets) if name == "ours" else (targets,)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(hidden, weight, *arguments)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert all(x.dtype == torch.float32 for x in gradients)
        errors[name] = [relative_rms(*pair) for pair in zip(gradients, exact, strict=True)]
    for ours, torchs in zip(errors["ours"], errors["torch"], strict=True):
        assert 0 < ours < 1.2 * torchs + 1e-4


def test_logits_are_never_whole() -> None:
    num_tokens, vocab_size = 3 * CHUNK_TOKENS, 64
    hidden = torch.randn(num_tokens, 2, requires_grad=True)
    weight = torch.randn(vocab_size, 2, requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.int64)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, None, targets).backward()
    assert largest.num_values == CHUNK_TOKENS * vocab_size


def run_fla(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss and gradients by fla's kernels."""
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = fla_linear_cross_entropy(hidden, weight, targets)
    return [loss.detach(), *torch.autograd.grad(2 * loss, (hidden, weight))]


def test_fla(interpreter: Interpreter) -> None:
    hidden, weight, targets = (x.detach() for x in make_inputs())
    actual = interpreter.run(run_fla, hidden, weight, targets)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = chunk_linear_cross_entropy(hidden, weight, targets)
    expected = [loss, *torch.autograd.grad(2 * loss, (hidden, weight))]
    for theirs, ours in zip(actual, expected, strict=True):
        assert relative_rms(theirs, ours) < 1e-5
