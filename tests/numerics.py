"""How close two tensors are, and how large they get."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is expected."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    scale = expected.double().square().mean().sqrt().clamp(min=1e-12)
    return ((actual.double() - expected.double()).square().mean().sqrt() / scale).item()


class LargestTensor(TorchDispatchMode):
    """Sees how large the largest result is."""

    num_values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.num_values = max(self.num_values, *sizes, 0)
        return result
