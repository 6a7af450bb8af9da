"""Gradients that are not finite change nothing; others are clipped as torch clips them."""

import pytest
import torch
from torch import nn

from slm.training.config import OptimizerConfig
from slm.training.guard import clip_and_guard
from slm.training.optimizer import MuonAdamW, build_optimizer
from tests.slm.training.test_optimizer import small_model


def set_gradients(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clips_as_torch_does(max_norm: float | None) -> None:
    ours, theirs = small_model(), small_model()
    set_gradients(ours)
    set_gradients(theirs)
    optimizer, _ = build_optimizer(ours, OptimizerConfig(), max_steps=2, tokens_per_step=1)
    assert clip_and_guard(optimizer, list(ours.parameters()), max_norm)
    nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out(name: str, value: float) -> None:
    """As if the batch had not been: the optimizer goes on as another that never saw it."""
    config = OptimizerConfig(name=name, weight_decay=0.0, lr=0.01)
    model, other = small_model(), small_model()
    optimizers = [
        build_optimizer(each, config, max_steps=9, tokens_per_step=1)[0] for each in (model, other)
    ]
    for seed in (1, 2, 3):
        for each, optimizer in zip((model, other), optimizers, strict=True):
            set_gradients(each, seed)
            if seed == 2 and each is other:
                continue
            if seed == 2:
                model.get_parameter("embedding.weight").grad[3, 1] = value  # type: ignore[index]
            is_finite = clip_and_guard(optimizer, list(each.parameters()), 1.0)
            assert bool(is_finite) == (seed != 2)
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_stays_finite() -> None:
    model = small_model()
    config = OptimizerConfig(name="muon", lr=0.01)
    optimizer, _ = build_optimizer(model, config, max_steps=9, tokens_per_step=1)
    assert isinstance(optimizer, MuonAdamW)
    for seed in (1, 2, 3):
        set_gradients(model, seed)
        if seed == 2:
            model.get_parameter("layers.0.operator.out_proj.weight").grad[0, 0] = float("nan")  # type: ignore[index]
        clip_and_guard(optimizer, list(model.parameters()), 1.0)
        embedding = model.get_parameter("embedding.weight").clone()
        optimizer.step()
        assert torch.equal(embedding, model.get_parameter("embedding.weight")) == (seed == 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
