"""Logits divided by the norms of the head's rows, which are computed once per head."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import relative_rms
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slm.architecture import Architecture
from slm.generation import Decoder
from slm.model import LanguageModel

TEXT = "width=32 vocab_size=60 normalize_logits=True tie_embeddings={} | ffn"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(Architecture.parse(TEXT.format(request.param))).eval()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 32)


def head(model: LanguageModel) -> nn.Parameter:
    return model.embedding.weight if model.architecture.tie_embeddings else model.head.weight


def expected(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Cosines of the rows, times the length of `hidden`."""
    weight = head(model).detach()
    cosines = nn.functional.cosine_similarity(hidden.unsqueeze(-2), weight, dim=-1)
    return cosines * hidden.norm(dim=-1, keepdim=True)


class Readers(TorchDispatchMode):
    """Counts how often each function reads a tensor of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        is_view = func in (torch.ops.aten.t.default, torch.ops.aten.detach.default)
        if not is_view and any(isinstance(x, Tensor) and x.shape == self.shape for x in args):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_head_is_read_once_more_only_for_the_first_token(
    model: LanguageModel, hidden: Tensor
) -> None:
    first = model.logits(hidden)
    assert relative_rms(first, expected(model, hidden)) < 1e-6
    with Readers(head(model).shape) as readers:
        again = [model.logits(hidden) for _ in range(3)]
    # The product itself reads the transposed head.
    assert readers.names == []
    assert all(torch.equal(logits, first) for logits in again)


def optimize(model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
    model.logits(torch.randn(2, 32)).square().sum().backward()
    optimizer.step()


def step(model: LanguageModel) -> None:
    optimize(model, torch.optim.SGD(model.parameters(), lr=1.0))


def step_fused(model: LanguageModel) -> None:
    # It does not count as a change.
    optimize(model, torch.optim.AdamW([head(model)], lr=1.0, fused=True))


def load(model: LanguageModel) -> None:
    model.load_state_dict({name: torch.randn_like(x) for name, x in model.state_dict().items()})


def assign(model: LanguageModel) -> None:
    weights = {name: torch.randn_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)


def replace(model: LanguageModel) -> None:
    owner = model.embedding if model.architecture.tie_embeddings else model.head
    owner.weight = nn.Parameter(torch.randn_like(owner.weight))


def scale_rows(model: LanguageModel) -> None:
    with torch.no_grad():
        head(model).mul_(torch.rand(60, 1) + 0.5)


def swap_data(model: LanguageModel) -> None:
    head(model).data = torch.randn_like(head(model))


def round_trip(model: LanguageModel) -> None:
    # Back to where it was, but rounded.
    model.to(torch.bfloat16).to(torch.float32)


def hidden_write(model: LanguageModel) -> None:
    # As sharded training writes gathered weights: where nothing counts it.
    head(model).data.normal_()
    model.train().eval()


@pytest.mark.parametrize("use_inference_mode", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize(
    "change",
    [step, step_fused, load, assign, replace, scale_rows, swap_data, round_trip, hidden_write],
)
def test_a_changed_head_is_seen(
    model: LanguageModel,
    hidden: Tensor,
    change: Callable[[LanguageModel], None],
    use_inference_mode: bool,
) -> None:
    with torch.inference_mode(use_inference_mode), torch.no_grad():
        before = model.logits(hidden)
    change(model)
    with torch.inference_mode(use_inference_mode), torch.no_grad():
        assert relative_rms(model.logits(hidden), expected(model, hidden)) < 1e-6
    if change not in (scale_rows, round_trip):
        assert relative_rms(before, expected(model, hidden)) > 0.1


def test_remembered_norms_do_not_stand_in_the_way_of_gradients(
    model: LanguageModel, hidden: Tensor
) -> None:
    with torch.inference_mode():
        model.logits(hidden)
    for mode in (False, True):
        model.train(mode)
        with torch.inference_mode():
            model.logits(hidden)
        weight = head(model)
        (gradient,) = torch.autograd.grad(model.logits(hidden).square().sum(), weight)
        # The length of a row does not matter: no gradient along it.
        along = (gradient * weight).sum(-1)
        assert along.abs().max() < 1e-4 * gradient.abs().max()
        assert gradient.any()


def test_weights_made_under_inference_mode_work(hidden: Tensor) -> None:
    with torch.inference_mode():
        model = LanguageModel(Architecture.parse(TEXT.format(False))).eval()
        model.logits(hidden)
        model.head.weight.normal_()
        assert relative_rms(model.logits(hidden), expected(model, hidden)) < 1e-6


def test_a_copy_has_norms_of_its_own(model: LanguageModel, hidden: Tensor) -> None:
    with torch.no_grad():
        model.logits(hidden)
        twin = copy.deepcopy(model)
        head(twin).normal_()
        assert relative_rms(twin.logits(hidden), expected(twin, hidden)) < 1e-6
        assert relative_rms(model.logits(hidden), expected(model, hidden)) < 1e-6


def test_the_decoder_remembers(model: LanguageModel) -> None:
    decoder = Decoder(model, max_tokens=8)
    decoder.prefill(torch.tensor([[1, 2]]))
    with Readers(head(model).shape) as readers:
        decoder.step(torch.tensor([3]))
    assert "linalg_vector_norm" not in readers.names
