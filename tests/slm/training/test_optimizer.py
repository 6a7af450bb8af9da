"""The optimizer is torch's own, its schedule the cosine's closed form."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from slm.architecture import Architecture
from slm.config import ConfigError, read
from slm.model import LanguageModel
from slm.training.config import OptimizerConfig
from slm.training.optimizer import build_optimizer, lr_factor


def small_model() -> LanguageModel:
    torch.manual_seed(1)
    operators = "mamba2(head_dim=16,state_size=8) ffn deltanet(head_dim=16) mamba(state_size=4) "
    operators += "linear_attention(head_dim=16)"
    return LanguageModel(Architecture.parse(f"width=32 vocab_size=40 meta_tokens=1 | {operators}"))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """A few steps on made-up gradients, so that no rounding of a model's own is amplified."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_equals_torch(name: str) -> None:
    decay = 0.3 if name == "adamw" else 0.0
    config = OptimizerConfig(
        name=name, lr=0.05, weight_decay=decay, betas=(0.8, 0.9), warmup_steps=2
    )
    ours, theirs = small_model(), small_model()
    optimizer, scheduler = build_optimizer(ours, config, max_steps=6, tokens_per_step=1)
    train(ours, optimizer, scheduler)

    # Torch's plain loop, its own schedules, and a list of parameters written out by hand.
    decayed = ["embedding.weight", "meta_tokens"]
    decayed += [f"layers.0.operator.{part}_proj.weight" for part in ("in", "out")]
    decayed += [f"layers.1.operator.{part}_proj.weight" for part in ("gate_up", "down")]
    decayed += [f"layers.2.operator.{part}_proj.weight" for part in ("qkv", "beta", "o")]
    decayed += [f"layers.3.operator.{part}_proj.weight" for part in ("in", "x", "out")]
    decayed += ["layers.3.operator.dt_weight"]
    decayed += [f"layers.4.operator.{part}.weight" for part in ("qkv_proj", "features", "o_proj")]
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [named[key] for key in decayed], "weight_decay": decay},
        {"params": [named[key] for key in named if key not in decayed], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    reference = kind(groups, lr=0.05, betas=(0.8, 0.9), foreach=False)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        reference,
        [
            torch.optim.lr_scheduler.LinearLR(reference, 0.5, 1.0, total_iters=1),
            torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=4, eta_min=0.005),
        ],
        milestones=[2],
    )
    train(theirs, reference, schedule)
    for key, weight in ours.named_parameters():
        torch.testing.assert_close(weight, named[key], atol=1e-6, rtol=1e-5, msg=key)


def factor(
    config: OptimizerConfig, step: int, max_steps: int, tokens_per_step: int = 1, **options: float
) -> float:
    return lr_factor(config, step, max_steps, tokens_per_step, **options)


def test_cosine() -> None:
    config = OptimizerConfig(warmup_steps=4, min_lr_ratio=0.2)
    factors = [factor(config, step, 12) for step in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.6)
    assert factors[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 0.75)) / 2)
    assert factors[12:] == pytest.approx([0.2] * 4)
    # Without a warm-up the peak comes first; a run may be shorter than its warm-up.
    assert factor(OptimizerConfig(), 0, 1) == 1.0
    assert factor(OptimizerConfig(warmup_steps=9), 2, 3) == pytest.approx(3 / 9)


def test_wsd_and_constant() -> None:
    config = OptimizerConfig(schedule="wsd", warmup_steps=2, decay_share=0.25, min_lr_ratio=0.1)
    factors = [factor(config, step, 22) for step in range(25)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[17] == 1.0
    assert factors[18:22] == pytest.approx([1 - 0.9 * fallen / 5 for fallen in (1, 2, 3, 4)])
    assert factors[22:] == pytest.approx([0.1] * 3)
    constant = OptimizerConfig(schedule="constant", warmup_steps=2)
    assert [factor(constant, step, 4) for step in range(6)] == [0.5, *[1.0] * 5]


def test_warmup_in_tokens() -> None:
    config = OptimizerConfig(warmup_tokens=1000, schedule="constant")
    factors = [factor(config, step, 99, tokens_per_step=300) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedule_follows_the_time_budget_when_it_runs_ahead(schedule: str) -> None:
    config = OptimizerConfig(schedule=schedule, min_lr_ratio=0.0, decay_share=1.0)
    assert factor(config, 10, 100, time_used=0.5) == pytest.approx(0.5)
    assert factor(config, 50, 100, time_used=0.1) == pytest.approx(0.5)
    assert factor(config, 10, 100, time_used=1.7) == pytest.approx(0.0)


def test_muon_equals_torchs_two_optimizers() -> None:
    config = OptimizerConfig(
        name="muon", lr=0.02, weight_decay=0.3, betas=(0.8, 0.9), schedule="constant"
    )
    ours, theirs = small_model(), small_model()
    optimizer, scheduler = build_optimizer(ours, config, max_steps=6, tokens_per_step=1)
    # Going on from a saved state is part of it.
    train(ours, optimizer, scheduler)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer, scheduler = build_optimizer(ours, config, max_steps=6, tokens_per_step=1)
    optimizer.load_state_dict(state)
    train(ours, optimizer, scheduler)

    named = dict(theirs.named_parameters())
    hidden = [f"layers.{place}" for place in range(5)]
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if parameter.ndim == 2 and not name.endswith(("A_log", "D"))
    }
    of_operators = [p for name, p in matrices.items() if name.startswith(tuple(hidden))]
    outer = [p for name, p in matrices.items() if not name.startswith(tuple(hidden))]
    rest = [p for name, p in named.items() if name not in matrices]
    settings = {"lr": 0.02, "betas": (0.8, 0.9)}
    muon = torch.optim.Muon(of_operators, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outer, weight_decay=0.3, **settings)
    plain = torch.optim.AdamW(rest, weight_decay=0.0, **settings)
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in theirs.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for each in (muon, adamw, plain):
                each.step()
    for key, weight in ours.named_parameters():
        torch.testing.assert_close(weight, named[key], atol=1e-5, rtol=1e-4, msg=key)


def test_weight_norm_runs_after_each_step() -> None:
    model = small_model()
    config = OptimizerConfig(name="adam", lr=0.05, weight_decay=0.0, weight_norm=True)
    optimizer, scheduler = build_optimizer(model, config, max_steps=5, tokens_per_step=1)
    train(model, optimizer, scheduler)
    norm = model.get_parameter("layers.1.operator.gate_up_proj.weight").norm(dim=1)
    torch.testing.assert_close(norm, torch.ones_like(norm), atol=1e-5, rtol=0)


def test_what_contradicts_itself_is_refused_at_once() -> None:
    values = {"warmup_steps": 2, "warmup_tokens": 3, "weight_norm_embeddings": True}
    with pytest.raises(ConfigError) as caught:
        read(OptimizerConfig, values, "optimizer")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "optimizer.warmup_tokens",
        "optimizer.weight_norm_embeddings",
    ]


@pytest.mark.parametrize("change", [{"name": "adam"}, {"weight_norm": True}])
def test_decay_is_refused_where_it_does_nothing_good(change: dict) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.weight_decay: must be 0 with .*, got 0.1"):
        read(OptimizerConfig, {"weight_decay": 0.1, **change}, "optimizer")
