"""How a model's layers are run in training: computed anew, compiled, sharded over devices."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from slm.model import LanguageModel
from slm.training.config import TrainerConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# With and without meta tokens before, with gradients and without, of two lengths.
VARIANTS_PER_KIND = 8


def wrap_layers(model: LanguageModel, config: TrainerConfig, mesh: DeviceMesh | None) -> None:
    """Have the layers of `model` run as `config` says, in place; names of weights stay.

    mesh: of the devices that weights, gradients and optimizer are shared out over (FSDP2); None:
        each has all of them.
    """
    if config.compile:
        # Layers share a forward, of which each kind of operator makes several variants.
        kinds = len(set(model.architecture.operators))
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS_PER_KIND * kinds)
    for layer in model.layers:
        run: Any = layer.forward
        if config.compile:
            run = torch.compile(run)
        if config.activation_checkpointing:
            # Nothing of a layer is random.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        layer.forward = run  # type: ignore[method-assign]
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
