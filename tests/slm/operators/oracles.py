"""What the tests of operators share: other people's operators, and ways to run ours."""

import functools
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from slm.operators import Operator

# transformers takes the functions of these packages, wherever they can be imported.
KERNEL_PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")


@functools.cache
def torch_model(name: str) -> ModuleType:
    """The module transformers.models.<name>, computing with its own torch functions.

    Which functions it computes with is decided while it is imported, by what else can be imported
    and not by the device; those of fla then fail on CPU tensors. So the module is executed a second
    time, under its name but without those packages. Neither its namesake nor the packages' entries
    in sys.modules are touched for longer than that, so no other test notices.
    """
    spec = importlib.util.find_spec(f"transformers.models.{name}")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for package in KERNEL_PACKAGES:
            patch.setitem(sys.modules, package, None)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Give every parameter values at which it matters, also those that start at zero or one."""
    for parameter in module.parameters():
        parameter.normal_(std=0.3)


@torch.no_grad()
def decode(operator: Operator, x: Tensor) -> Tensor:
    """y [B, T, D] of x [B, T, D], one token at a time."""
    state = operator.init_state(*x.shape[:2])
    return torch.stack([operator.step(token, state) for token in x.unbind(1)], dim=1)


def is_alike(actual: Tensor, expected: Tensor) -> bool:
    """Whether two samples may come from the same distribution (Kolmogorov and Smirnov)."""
    samples = (x.detach().flatten().numpy() for x in (actual, expected))
    return stats.ks_2samp(*samples).pvalue > 0.01


def matrix_flops(operator: Operator) -> int:
    """FLOPs of one token in the linear maps of `operator`."""
    maps = (module for module in operator.modules() if isinstance(module, nn.Linear))
    return sum(2 * module.weight.numel() for module in maps)


def state_bytes(operator: Operator) -> int:
    """Bytes of one row's state."""
    tensors = operator.init_state(1, 1).tensors()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
