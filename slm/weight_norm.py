"""Weight normalization: matrices projected onto the unit sphere after each optimizer step.

Nemotron-Flash (arXiv 2511.18890), after nGPT (arXiv 2410.01131). Each vector that
lives in the residual stream gets unit L2 norm: the rows of a matrix that reads the stream, the
columns of one that writes to it. There is no learned scale; the RMSNorms stay; weight decay must
be off, for the projection undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slm.operators import Operator

# A row this short is left as it is, rather than blown up: division by zero would make it NaN.
SMALLEST_NORM = 1e-12


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Name, parameter and axis (that of the model's width) of each matrix to project.

    Which those are, each operator says itself (`Operator.reads` and `Operator.writes`). Left out
    are convolutions, gates, norms and all else that is no projection from or to the stream; and the
    embedding, meta tokens and head, whose scale the norms after them, or the model's
    `normalize_logits`, take out in the forward pass.
    """
    for path, module in model.named_modules():
        if isinstance(module, Operator):
            for names, axis in ((module.reads, 1), (module.writes, 0)):
                for name in names:
                    yield f"{path}.{name}" if path else name, module.get_parameter(name), axis


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Give unit norm to every vector along the model's width, in place."""
    for _, weight, axis in matrices(model):
        _project(weight, axis)


def attach(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Project `model` now and after each step of `optimizer`.

    A hook of the optimizer runs before anything else sees the step, so checkpoints hold projected
    weights.
    """
    project(model)
    return optimizer.register_step_post_hook(lambda *_: project(model))


def _project(weight: Tensor, axis: int) -> None:
    # In fp32 also for weights kept in bf16.
    norm = torch.linalg.vector_norm(weight, dim=axis, keepdim=True, dtype=torch.float32)
    weight.div_(norm.clamp_(min=SMALLEST_NORM))
