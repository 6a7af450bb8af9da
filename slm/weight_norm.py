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
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slm.compilation import Argument, Library, has_compiler, library
from slm.operators import Operator

# A row this short is left as it is, rather than blown up: division by zero would make it NaN.
SMALLEST_NORM = 1e-12
# Of the model itself, those whose rows are vectors of the stream.
EMBEDDINGS = ("embedding.weight", "head.weight")
# Matrices of so many bytes on a CPU, which its caches do not keep from step to step, are projected
# by compiled code: it reads each once and has its norms and its product in one go.
COMPILED_BYTES = 2**20
# Rows of a matrix whose columns are measured side by side, so that memory is read as it lies.
BAND_ROWS = 32


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
        if _is_worth_compiling(weight):
            library = _library(axis, weight.shape[axis], weight.dtype, torch.get_num_threads())
            library([weight])
        else:
            weight.mul_(_scales(weight, axis))


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


def _is_worth_compiling(weight: Tensor) -> bool:
    """Whether it is large, whole and on a CPU, and something can be compiled here."""
    is_whole = weight.device.type == "cpu" and type(weight) is nn.Parameter
    return is_whole and weight.nbytes >= COMPILED_BYTES and has_compiler()


@cache
def _library(axis: int, width: int, dtype: torch.dtype, num_threads: int) -> Library:
    """Projects a matrix of any number of vectors, for that many threads."""
    # What the example has decides whether the compiler divides the work between threads.
    num_vectors = COMPILED_BYTES // (width * dtype.itemsize)
    shape = (num_vectors, width) if axis == 1 else (width, num_vectors)
    example = Argument(torch.empty(shape, dtype=dtype), varying=(1 - axis,))
    function = _project_rows if axis == 1 else _project_columns
    # The name holds this file, so that none is taken that another version of it has left on disk.
    source = Path(__file__).read_text(encoding="utf-8")
    return library(f"weight_norm{function.__name__} of {source}", function, [example])


def _project_rows(weight: Tensor) -> tuple[Tensor, ...]:
    weight.mul_(_scales(weight, 1))
    return ()


def _project_columns(weight: Tensor) -> tuple[Tensor, ...]:
    bands = weight.unflatten(0, (-1, math.gcd(weight.shape[0], BAND_ROWS)))  # [D / 32, 32, C]
    norms = torch.linalg.vector_norm(bands, dim=0, dtype=torch.float32)
    weight.mul_(_scales(norms, 0))
    return ()
