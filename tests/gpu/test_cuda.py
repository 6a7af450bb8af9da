"""The model on a CUDA device: the same numbers as on the CPU."""

import pytest
import torch
from numerics import relative_rms

from slm.architecture import Architecture
from slm.generation import Decoder
from slm.model import LanguageModel
from slm.operators import OPERATORS as OPERATOR_CLASSES
from slm.operators import parse_operator

pytestmark = pytest.mark.gpu

OPERATORS = (
    "attention(head_dim=16,query_groups=2)",
    "attention(head_dim=16,window=7)",
    "attention(head_dim=16,window=7,pinned_tokens=3)",
    "mamba(state_size=8)",
    "mamba2(head_dim=16,state_size=16)",
    "linear_attention(head_dim=16)",
    "gla(head_dim=32)",
    "deltanet(head_dim=16)",
    "gated_deltanet(head_dim=16)",
    "rwkv7(head_dim=16)",
    "kda(head_dim=16)",
    "short_convolution",
    "ffn",
    "ffn(activation=relu2)",
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_and_gradients_equal_those_on_the_cpu(operator: str) -> None:
    model = LanguageModel(Architecture.parse(f"width=32 vocab_size=60 meta_tokens=3 | {operator}"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    tokens = torch.randint(60, (2, 90))
    documents = (torch.arange(90) >= 41).long().expand(2, -1)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        logits = model(tokens.to(device), documents.to(device))
        logits.square().mean().backward()
        gradients = {
            name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None
        }
        results.append({"logits": logits.detach().cpu(), **gradients})
    for name, expected in results[0].items():
        assert relative_rms(results[1][name], expected) < 5e-3, name


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_captured_step_equals_an_eager_one(operator: str) -> None:
    config = parse_operator(operator)
    mixer = OPERATOR_CLASSES[config.name](config, 32).to("cuda")
    x = torch.randn(10, 2, 32, device="cuda")
    with torch.inference_mode():
        for parameter in mixer.parameters():
            # Some start at zero, and would hide everything.
            parameter.normal_(std=0.2)
        eager = mixer.init_state(2, 10)
        expected = [mixer.step(token, eager) for token in x]
        captured, token = mixer.init_state(2, 10).upto(10), x[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mixer.step(token, captured)
        torch.cuda.current_stream().wait_stream(stream)
        captured.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mixer.step(token, captured)
        captured.reset()
        for t, each in enumerate(expected):
            token.copy_(x[t])
            graph.replay()
            torch.testing.assert_close(y, each, rtol=1e-5, atol=1e-6)


def test_decoding_equals_decoding_on_the_cpu() -> None:
    text = f"width=32 vocab_size=60 meta_tokens=3 | {' '.join(OPERATORS)}"
    model = LanguageModel(Architecture.parse(text))
    prompt = torch.randint(60, (2, 9))
    expected = list(Decoder(model, 40, 2).generate(prompt, 20))
    model.to("cuda")
    actual = list(Decoder(model, 40, 2).generate(prompt.to("cuda"), 20))
    assert torch.equal(torch.stack(actual).cpu(), torch.stack(expected))
