"""Weight normalization: matrices projected onto the unit sphere after each optimizer step.

Nemotron-Flash (arXiv 2511.18890), after nGPT (arXiv 2410.01131). Each vector that
lives in the residual stream gets unit L2 norm: the rows of a matrix that reads the stream, the
columns of one that writes to it. There is no learned scale; the RMSNorms stay; weight decay must
be off, for the projection undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slm.operators import Operator

# A row this short is left as it is, rather than blown up: division by zero would make it NaN.
SMALLEST_NORM = 1e-12
# Of the model itself, those whose rows are vectors of the stream.
EMBEDDINGS = ("embedding.weight", "head.weight")
# On a CPU, what of a matrix is measured and then scaled while a core's cache holds it.
BLOCK_BYTES = 2**21
# Matrices of so many bytes on a CPU have the norms of their columns found by compiled code.
COMPILED_BYTES = 2**21


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
        if axis == 1:
            for rows in _blocks(weight):
                rows.mul_(_scales(rows, 1))
        else:
            weight.mul_(_column_scales(weight))


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


def _blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Views of `weight` [R, D], some rows each."""
    if not _is_whole_on_cpu(weight):
        return (weight,)
    num_rows = BLOCK_BYTES // (weight.element_size() * weight.shape[1])
    return weight.split(max(1, num_rows))


def _column_scales(weight: Tensor) -> Tensor:
    """`_scales` of the columns of `weight` [D, C], which lie across memory."""
    if _is_whole_on_cpu(weight) and weight.nbytes >= COMPILED_BYTES:
        return _compiled_column_scales()(weight)
    return _scales(weight, 0)


@cache
def _compiled_column_scales() -> Any:
    return torch.compile(_column_scales_by_bands, dynamic=True)


def _column_scales_by_bands(weight: Tensor) -> Tensor:
    """Over bands of some rows first, which are read as memory has them."""
    bands = weight.unflatten(0, (-1, math.gcd(weight.shape[0], 32)))
    norms = torch.linalg.vector_norm(bands, dim=0, dtype=torch.float32)
    return (
        torch.linalg.vector_norm(norms, dim=0, keepdim=True).clamp(min=SMALLEST_NORM).reciprocal()
    )


def _is_whole_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and type(weight) is nn.Parameter
