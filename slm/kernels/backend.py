"""Which kernels run: this package's torch forms, or those of flash-linear-attention (fla).

`auto` follows the device of the tensors: fla on CUDA, torch elsewhere. Both compute the same from
the same weights. Mamba's scan is torch's everywhere, and so is attention, but for single tokens on
CUDA: unless 'torch' is asked for, they have a Triton kernel of our own. Every kernel says once, in
the log, what it runs.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from slm.kernels.documents import Documents

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


def check_backend(name: Backend, device_type: str, function: str = "ops") -> None:
    """Raise ValueError, with the way out, if `name` cannot run on 'cpu' or 'cuda' tensors.

    function: what of fla is wanted, by its path in the package.
    """
    if name != "fla":
        return
    if not _runs_triton(device_type):
        raise ValueError(
            f"backend: 'fla' needs tensors on a CUDA device, these are on {device_type!r}; "
            "use 'auto' or 'torch'"
        )
    try:
        fla_function(function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"backend: 'fla' cannot be imported ({error}); install flash-linear-attention[cuda], "
            "or use 'torch'"
        ) from None


def use_fla(kernel: str, x: Tensor, function: str | None) -> bool:
    """Whether `kernel` shall run fla's function on tensors such as x.

    function: its path in fla; None: there is none, and torch's form runs everywhere.
    Raises ValueError if fla is asked for where it cannot run.
    """
    return _choose(kernel, x.device.type, _backend, function)


@functools.cache
def _choose(kernel: str, device_type: str, backend: Backend, function: str | None) -> bool:
    # Cached, so it also logs once.
    chosen: Backend = "torch" if function is None else backend
    if function is not None:
        check_backend(backend, device_type, function)
        if backend == "auto":
            chosen = "fla" if _runs_triton(device_type) else "torch"
            try:
                check_backend(chosen, device_type, function)
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


def fla_function(path: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function of flash-linear-attention, which is imported when it is first needed.

    Raises ImportError or AttributeError if there is none at `path`, 'ops.gla.chunk_gla'.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"fla.{module}".rstrip(".")), name)


def run_fla(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    start: Tensor | None,
    documents: Documents | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call a recurrence of fla on rows [B, T, ...]; documents begin with `start` [B|1, ...].

    Returns (o [B, T, ...], the state after each row's last token), both in at least fp32.
    """
    # fla insists on fp32 states.
    start = None if start is None else start.float()
    options["output_final_state"] = True
    o, final = run_fla_packed(function, inputs, start, documents, **options)
    return o.float(), final if documents is None else final[documents.last_of_rows]


def run_fla_packed(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    start: Tensor | None,
    documents: Documents | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call a function of fla on rows [B, T, ...].

    Returns what it gives: (o [B, T, ...], the last state of every document, of every row without).
    """
    batch_size, num_tokens = next(iter(inputs.values())).shape[:2]
    if start is not None:
        start = start.expand(batch_size, *start.shape[1:])
    if documents is None:
        start = None if start is None else start.contiguous()
        inputs = {name: x.contiguous() for name, x in inputs.items()}
        return function(**inputs, initial_state=start, **options)

    # fla takes documents as one long row and the places where they begin.
    start = None if start is None else start[documents.first_tokens // num_tokens]
    inputs = {name: x.flatten(0, 1).unsqueeze(0).contiguous() for name, x in inputs.items()}
    o, final = function(**inputs, initial_state=start, cu_seqlens=documents.cu_seqlens, **options)
    return o.unflatten(1, (batch_size, num_tokens)).squeeze(0), final
