"""Which kernels run: this package's torch forms, or those of flash-linear-attention (fla).

`auto` follows the device of the tensors: fla on CUDA, torch elsewhere. Both compute the same from
the same weights. Every kernel says once, in the log, what it runs.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "fla"]

_backend: Backend = "auto"


def set_backend(name: Backend) -> None:
    """Choose the kernels of this process. Raises ValueError for a name that there is not."""
    global _backend
    if name not in get_args(Backend):
        raise ValueError(f"backend: must be one of {', '.join(get_args(Backend))}, got {name!r}")
    _backend = name


def current_backend() -> Backend:
    """The choice that `set_backend` made; 'auto' at first."""
    return _backend


def check_backend(name: Backend, device_type: str) -> None:
    """Raise ValueError, with the way out, if `name` cannot run on 'cpu' or 'cuda' tensors."""
    if name != "fla":
        return
    if not _runs_triton(device_type):
        raise ValueError(
            f"backend: 'fla' needs tensors on a CUDA device, these are on {device_type!r}; "
            "use 'auto' or 'torch'"
        )
    try:
        importlib.import_module("fla.ops")
    except ImportError as error:
        raise ValueError(
            f"backend: 'fla' cannot be imported ({error}); install flash-linear-attention[cuda], "
            "or use 'torch'"
        ) from None


def use_fla(kernel: str, x: Tensor) -> bool:
    """Whether `kernel` shall run fla's function on tensors such as x.

    Raises ValueError if fla is asked for where it cannot run.
    """
    return _choose(kernel, x.device.type, _backend)


@functools.cache
def _choose(kernel: str, device_type: str, backend: Backend) -> bool:
    # Cached, so it also logs once.
    check_backend(backend, device_type)
    chosen = backend
    if backend == "auto":
        chosen = "fla" if _runs_triton(device_type) else "torch"
        try:
            check_backend(chosen, device_type)
        except ValueError as error:
            log.warning("%s on %s: the slower torch form, for %s", kernel, device_type, error)
            chosen = "torch"
    log.info("%s on %s: %s", kernel, device_type, chosen)
    return chosen == "fla"


def _runs_triton(device_type: str) -> bool:
    # Triton's interpreter runs kernels on CPU tensors, slowly: to check them.
    return device_type == "cuda" or (
        device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )


def fla_function(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of flash-linear-attention, which is imported when it is first needed."""
    return getattr(importlib.import_module(f"fla.{module}"), name)


def run_fla(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    start: Tensor | None,
    documents: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call a recurrence of fla on rows [B, T, ...]; documents begin with `start` [B|1, ...].

    Returns (o [B, T, ...], the state after each row's last token), both in at least fp32.
    """
    # fla insists on fp32 states.
    start = None if start is None else start.float()
    begins = None
    if documents is not None:
        begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    o, final = run_fla_packed(function, inputs, start, begins, output_final_state=True, **options)
    if begins is not None:
        final = final[begins.sum(dim=1).cumsum(dim=0) - 1]
    return o.float(), final


def run_fla_packed(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    start: Tensor | None,
    begins: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call a function of fla on rows [B, T, ...] with documents that begin where `begins` [B, T].

    Returns what it gives: (o [B, T, ...], the last state of every document, of every row without).
    """
    batch_size, num_tokens = next(iter(inputs.values())).shape[:2]
    if start is not None:
        start = start.expand(batch_size, *start.shape[1:])
    if begins is None:
        start = None if start is None else start.contiguous()
        inputs = {name: x.contiguous() for name, x in inputs.items()}
        return function(**inputs, initial_state=start, **options)

    # fla takes documents as one long row and the places where they begin.
    place = begins.flatten().nonzero().squeeze(1)
    cu_seqlens = F.pad(place, (0, 1), value=batch_size * num_tokens)
    start = None if start is None else start[place // num_tokens]
    packed = {name: x.flatten(0, 1).unsqueeze(0).contiguous() for name, x in inputs.items()}
    o, final = function(**packed, initial_state=start, cu_seqlens=cu_seqlens, **options)
    return o.unflatten(1, (batch_size, num_tokens)).squeeze(0), final
