"""Norms of weights and gradients by kind: embedding, norms, and each operator's name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slm.model import LanguageModel


def parameters_by_kind(model: LanguageModel) -> dict[str, list[nn.Parameter]]:
    """Parameters by what they belong to; each is in one list, and empty ones are in none.

    Kinds: 'embedding', 'meta_tokens', the operators' names in the order they first occur, 'norms'
    (those before operators and head) and, unless it is the embedding, 'head'.
    """
    kinds = {
        "embedding": list(model.embedding.parameters()),
        "meta_tokens": [model.meta_tokens],
    }
    for config, layer in zip(model.architecture.operators, model.layers, strict=True):
        kinds.setdefault(config.name, []).extend(layer.operator.parameters())
    kinds["norms"] = [layer.norm.weight for layer in model.layers] + [model.norm.weight]
    if not model.architecture.tie_embeddings:
        kinds["head"] = list(model.head.parameters())
    filled = {kind: [each for each in found if each.numel()] for kind, found in kinds.items()}
    return {kind: found for kind, found in filled.items() if found}


@torch.no_grad()
def norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """L2 norm of all tensors together, a scalar on `device`; nothing waits for it.

    Of tensors in shards (DTensor) it is that of the whole ones: every process has to ask for it.
    """
    from torch.distributed.tensor import DTensor

    total = nn.utils.get_total_norm(tensors)
    if isinstance(total, DTensor):
        total = total.full_tensor()
    # Of no tensors at all it is on the CPU.
    return total.to(device)


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are."""
    return [each.grad for each in parameters if each.grad is not None]
