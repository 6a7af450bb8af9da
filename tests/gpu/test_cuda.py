"""The model on a CUDA device: the same numbers as on the CPU."""

import pytest
import torch

from slm.architecture import Architecture
from slm.generation import Decoder
from slm.model import LanguageModel

pytestmark = pytest.mark.gpu

OPERATORS = (
    "attention(head_dim=16,query_groups=2)",
    "attention(head_dim=16,window=7)",
    "mamba2(head_dim=16,state_size=8)",
    "deltanet(head_dim=16)",
    "ffn",
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_and_gradients_equal_those_on_the_cpu(operator: str) -> None:
    model = LanguageModel(Architecture.parse(f"width=32 vocab_size=60 meta_tokens=3 | {operator}"))
    tokens = torch.randint(60, (2, 90))
    documents = (torch.arange(90) >= 41).long().expand(2, -1)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        logits = model(tokens.to(device), documents.to(device))
        logits.square().mean().backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach().cpu(), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_decoding_equals_decoding_on_the_cpu() -> None:
    text = f"width=32 vocab_size=60 meta_tokens=3 | {' '.join(OPERATORS)}"
    model = LanguageModel(Architecture.parse(text))
    prompt = torch.randint(60, (2, 9))
    expected = list(Decoder(model, 40, 2).generate(prompt, 20))
    model.to("cuda")
    actual = list(Decoder(model, 40, 2).generate(prompt.to("cuda"), 20))
    assert torch.equal(torch.stack(actual).cpu(), torch.stack(expected))
