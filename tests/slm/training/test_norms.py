"""Norms, and whole models, of weights that lie in shards."""

from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.training.norms import gradients, norm, parameters_by_kind
from slm.training.samples import whole

ARCHITECTURE = Architecture.parse(
    "width=32 vocab_size=51 meta_tokens=3 | attention(head_dim=16) ffn mamba2(head_dim=16)"
)
CPU = torch.device("cpu")


def trained_once() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ARCHITECTURE)


def backward(model: LanguageModel) -> None:
    model(torch.arange(40).view(2, 20)).logsumexp(-1).sum().backward()


def norms(model: LanguageModel) -> dict[str, tuple[float, float]]:
    """Of weights and gradients, by kind."""
    return {
        kind: (norm(found, CPU).item(), norm(gradients(found), CPU).item())
        for kind, found in parameters_by_kind(model).items()
    }


def shard_and_compare(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = trained_once()
    backward(model)
    expected, weights = norms(model), model.state_dict()
    sharded = trained_once()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    backward(sharded)
    found = norms(sharded)
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[kind]), torch.tensor(values), msg=kind)
    copied = whole(sharded)
    if rank == 0:
        assert copied is not None
        assert copied.state_dict().keys() == weights.keys()
        for name, weight in copied.state_dict().items():
            assert torch.equal(weight, weights[name]), name
    else:
        assert copied is None
    distributed.destroy_process_group()


def test_shards_have_the_norms_of_the_whole(tmp_path: Path) -> None:
    mp.spawn(shard_and_compare, (str(tmp_path),), nprocs=2)


def test_parameters_without_a_gradient_add_nothing() -> None:
    model = trained_once()
    assert all(gradient == 0 for _, gradient in norms(model).values())
    assert whole(model) is model
