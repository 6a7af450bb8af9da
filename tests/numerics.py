"""How close two tensors are."""

from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is expected."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    scale = expected.double().square().mean().sqrt().clamp(min=1e-12)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()
