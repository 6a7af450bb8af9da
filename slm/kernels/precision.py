"""The precision that recurrences are computed in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_fp32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: compute in at least fp32, whatever the tensors given by place are, and autocast.

    The first of them tells the device. What is of that precision already, as states are, is passed
    on itself, so that it can be changed in place.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        widened: Any = map(_widen, args)
        with torch.autocast(args[0].device.type, enabled=False):  # type: ignore[attr-defined]
            return function(*widened, **kwargs)

    return run


def _widen(x: object) -> object:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.to(accumulation_dtype(x))
    return x
