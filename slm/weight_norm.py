"""Weight normalization: matrices projected onto the unit sphere after each optimizer step.

Nemotron-Flash (arXiv 2511.18890), after nGPT (arXiv 2410.01131). Each vector that
lives in the residual stream gets unit L2 norm: the rows of a matrix that reads the stream, the
columns of one that writes to it. There is no learned scale; the RMSNorms stay; weight decay must
be off, for the projection undoes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slm.native import native_library
from slm.operators import Operator

# A vector is divided by no less: zeros stay zeros, rather than becoming NaN.
SMALLEST_NORM = 1e-12
# Of the model itself, those whose rows are vectors of the stream.
EMBEDDINGS = ("embedding.weight", "head.weight")
# Matrices of so many bytes on a CPU, which its caches do not keep from step to step, are projected
# by C++ of ours: it reads each from memory once, and measures and divides in one go.
NATIVE_BYTES = 2**20
SOURCE = Path(__file__).with_suffix(".cpp")


def matrices(model: nn.Module, embeddings: bool = False) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Name, parameter and axis (that of the model's width) of each matrix to project.

    Which those are, each operator says itself (`Operator.reads` and `Operator.writes`). Left out
    are convolutions, gates, norms and all else that is no projection from or to the stream; and,
    unless `embeddings`, the embedding and head, whose scale the norms after them, or the model's
    `normalize_logits`, take out in the forward pass. Meta tokens are inputs, not weights.
    """
    for path, module in model.named_modules():
        if isinstance(module, Operator):
            for names, axis in ((module.reads, 1), (module.writes, 0)):
                for name in names:
                    yield f"{path}.{name}" if path else name, module.get_parameter(name), axis
    if embeddings:
        for name, parameter in model.named_parameters():
            if name in EMBEDDINGS:
                yield name, parameter, 1


@torch.no_grad()
def project(model: nn.Module, embeddings: bool = False) -> None:
    """Give unit norm to every vector along the model's width, in place.

    Weights may be sharded (DTensors): each rank projects its share.
    """
    for _, weight, axis in matrices(model, embeddings):
        native = native_library(SOURCE) if _is_worth_a_native_function(weight) else None
        if native is None:
            weight.mul_(_scales(weight, axis))
        else:
            function = native.unit_rows if axis == 1 else native.unit_columns
            function(
                ctypes.c_void_p(weight.data_ptr()),
                *map(ctypes.c_long, weight.shape),
                ctypes.c_float(SMALLEST_NORM),
                torch.get_num_threads(),
            )
            # For whoever remembers what it has computed from the weight.
            torch.autograd.graph.increment_version(weight)


def attach(optimizer: Optimizer, model: nn.Module, embeddings: bool = False) -> RemovableHandle:
    """Project `model` now and after each step of `optimizer`.

    A hook of the optimizer runs before anything else sees the step, so checkpoints hold projected
    weights.
    """
    project(model, embeddings)
    return optimizer.register_step_post_hook(lambda *_: project(model, embeddings))


def _scales(weight: Tensor, axis: int) -> Tensor:
    """One over the norm of each vector along `axis`; in fp32 also for weights kept in bf16."""
    norms = torch.linalg.vector_norm(weight, dim=axis, keepdim=True, dtype=torch.float32)
    return norms.clamp(min=SMALLEST_NORM).reciprocal()


def _is_worth_a_native_function(weight: Tensor) -> bool:
    """Whether it is a large matrix in fp32, whole and on a CPU."""
    is_whole = type(weight) is nn.Parameter and weight.ndim == 2 and weight.is_contiguous()
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_whole and is_plain and weight.nbytes >= NATIVE_BYTES
