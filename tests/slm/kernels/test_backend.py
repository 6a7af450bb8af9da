"""Which kernels run: the choice, what it says, and whole models under flash-linear-attention."""

import logging
import sys
from collections.abc import Iterator
from logging.handlers import BufferingHandler

import pytest
import torch
from numerics import relative_rms
from torch import Tensor
from triton_interpreter import Interpreter

from slm.architecture import Architecture
from slm.kernels import backend
from slm.kernels.backend import Backend, check_backend, current_backend, set_backend, use_fla
from slm.kernels.gla import FLA
from slm.model import LanguageModel

# Every operator with a recurrence or a convolution, and their kernels.
OPERATORS = {
    "deltanet(head_dim=16)": ["convolution", "delta_rule"],
    "gated_deltanet(head_dim=16,expand_v=1.0)": ["convolution", "gated_delta_rule"],
    "gla(head_dim=32)": ["gla"],
    "kda(head_dim=16)": ["convolution", "kda"],
    "linear_attention(head_dim=16)": ["linear_attention"],
    "mamba(state_size=4)": ["convolution", "selective_scan"],
    "mamba2(head_dim=16,state_size=16)": ["convolution", "ssd"],
    "rwkv7(head_dim=16)": ["rwkv7"],
    "short_convolution": ["convolution"],
}


@pytest.fixture(autouse=True)
def _own_choice() -> Iterator[None]:
    backend._choose.cache_clear()
    yield
    set_backend("auto")
    backend._choose.cache_clear()


def test_torch_on_the_cpu_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slm.kernels.backend")
    assert current_backend() == "auto"
    for _ in range(3):
        assert not use_fla("gla", torch.zeros(1), FLA)
    assert [record.message for record in caplog.records] == ["gla on cpu: torch"]


def test_what_cannot_run_is_refused_with_the_way_out() -> None:
    set_backend("fla")
    with pytest.raises(ValueError, match=r"needs tensors on a CUDA device.* use 'auto' or 'torch'"):
        use_fla("gla", torch.zeros(1), FLA)
    with pytest.raises(ValueError, match="backend: must be one of auto, torch, fla, got 'cuda'"):
        set_backend("cuda")  # type: ignore[arg-type]
    assert current_backend() == "fla"
    check_backend("torch", "cpu")


def test_without_fla_a_gpu_gets_torch_and_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    assert not backend._choose("gla", "cuda", "auto", FLA)
    assert "the slower torch form" in caplog.text
    with pytest.raises(ValueError, match=r"install flash-linear-attention\[cuda\], or use 'torch'"):
        backend._choose("gla", "cuda", "fla", FLA)


def run_model(
    name: Backend, operator: str, weights: dict[str, Tensor], tokens: Tensor, documents: Tensor
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Logits, every gradient, and what was said of the choice, with the kernels of a backend."""
    said = BufferingHandler(capacity=1000)
    log = logging.getLogger("slm.kernels.backend")
    log.setLevel(logging.INFO)
    log.addHandler(said)
    backend._choose.cache_clear()
    set_backend(name)
    model = make_model(operator)
    model.load_state_dict(weights)
    logits = model(tokens, documents)
    logits.square().mean().backward()
    log.removeHandler(said)
    gradients = {key: p.grad for key, p in model.named_parameters()}
    return logits.detach(), gradients, [record.getMessage() for record in said.buffer]


def make_model(operator: str) -> LanguageModel:
    # One layer: the gradients of the embedding and the meta tokens are those of its inputs.
    return LanguageModel(Architecture.parse(f"width=32 vocab_size=60 meta_tokens=3 | {operator}"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_model_computes_the_same_with_either(interpreter: Interpreter, operator: str) -> None:
    model = make_model(operator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    tokens = torch.randint(60, (1, 70))
    documents = (torch.arange(70) >= 33).long().unsqueeze(0)
    kernels = OPERATORS[operator]
    arguments = (operator, weights, tokens, documents)
    theirs, their_gradients, said = interpreter.run(run_model, "fla", *arguments)
    ours, our_gradients, _ = run_model("torch", *arguments)
    chosen = {kernel: "torch" if kernel == "selective_scan" else "fla" for kernel in kernels}
    assert said == [f"{kernel} on cpu: {name}" for kernel, name in chosen.items()]
    assert relative_rms(theirs, ours) < 2e-6
    # Gradients of decays are small differences of large sums, in both.
    for key, gradient in our_gradients.items():
        assert relative_rms(their_gradients[key], gradient) < 2e-4, key
