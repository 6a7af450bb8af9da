"""However layers are run, they compute the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils

from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import OPERATORS
from slm.training.config import TrainConfig, TrainerConfig
from slm.training.fit import fit
from slm.training.loss import next_token_loss
from slm.training.wrapping import wrap_layers
from tests.slm.training.test_fit import losses

ConfigMaker = Callable[..., TrainConfig]
EVERY_OPERATOR = f"width=128 vocab_size=50 meta_tokens=2 | {' '.join(sorted(OPERATORS))}"
# Compiled in seconds; what runs over chunks takes minutes.
QUICK = {"blocks": {"A": {"operators": ["attention(head_dim=16)", "ffn(ratio=1.0)"]}}}


def loss_and_gradients(**changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = LanguageModel(Architecture.parse(EVERY_OPERATOR))
    wrap_layers(model, TrainerConfig(max_steps=1, **changes), mesh=None)
    tokens = torch.randint(50, (2, 33))
    documents = (torch.arange(32) >= 11).long().expand(2, -1)
    loss = next_token_loss(model, {"tokens": tokens, "documents": documents})
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_changes_nothing() -> None:
    loss, gradients = loss_and_gradients()
    again, recomputed = loss_and_gradients(activation_checkpointing=True)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_activation_checkpointing_keeps_less() -> None:
    def saved_bytes(**changes: Any) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = LanguageModel(
            Architecture.parse("width=32 vocab_size=50 | ffn mamba2(head_dim=16)")
        )
        wrap_layers(model, TrainerConfig(max_steps=1, **changes), mesh=None)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(torch.randint(50, (4, 64)))
        return sum(kept.values())

    assert saved_bytes(activation_checkpointing=True) < 0.3 * saved_bytes()


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_layers_train_alike(
    make_config: ConfigMaker, tmp_path: Path, activation_checkpointing: bool
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = {"max_steps": 4, "activation_checkpointing": activation_checkpointing}
    fit(make_config(model=QUICK, trainer=trainer), tmp_path / "eager")
    assert not torch._dynamo.utils.counters["stats"]
    fit(make_config(model=QUICK, trainer=trainer | {"compile": True}), tmp_path / "compiled")
    # Of two layers at least, with and without gradients.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
