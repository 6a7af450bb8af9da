"""What operators begin with of their own survives the models that they are part of."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slm.architecture import Architecture
from slm.hub.configuration import SLMConfig
from slm.hub.modeling import SLMForCausalLM
from slm.model import LanguageModel
from slm.operators import OPERATORS, Operator, parse_operator

# Small heads, of which there are many: a sample large enough to tell distributions apart.
WIDTH = 256
OPERATOR_TEXTS = (
    "attention(head_dim=4)",
    "mamba(state_size=4)",
    "mamba2(head_dim=4,state_size=8)",
    "linear_attention(head_dim=4)",
    "gla(head_dim=4)",
    "deltanet(head_dim=4)",
    "gated_deltanet(head_dim=4)",
    "rwkv7(head_dim=4)",
)
TEXT = f"width={WIDTH} vocab_size=8 | {' '.join(OPERATOR_TEXTS)}"


@pytest.fixture(params=["LanguageModel", "SLMForCausalLM"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model from scratch, by itself and inside the class for transformers."""
    if request.param == "LanguageModel":
        return LanguageModel(Architecture.parse(TEXT))
    return SLMForCausalLM(SLMConfig(TEXT)).model


def alone(text: str) -> Operator:
    config = parse_operator(text)
    return OPERATORS[config.name](config, WIDTH)


@pytest.mark.parametrize("index", range(len(OPERATOR_TEXTS) - 1), ids=OPERATOR_TEXTS.__getitem__)
def test_linear_maps_are_normal_and_the_rest_is_the_operators_own(
    model: LanguageModel, index: int
) -> None:
    operator, expected = model.layers[index].operator, alone(OPERATOR_TEXTS[index])
    for name, parameter in operator.named_parameters():
        owner = operator.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, nn.Linear):
            own = expected.get_parameter(name)
            spread = own.std().item()
            assert parameter.std().item() == pytest.approx(spread, rel=0.4), name
            assert parameter.mean().item() == pytest.approx(own.mean().item(), abs=spread / 2), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert parameter.mean().item() == pytest.approx(0.0, abs=0.002), name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_an_operator_has_the_last_word(model: LanguageModel) -> None:
    """RWKV-7 begins with linear maps of its own."""
    rwkv7 = model.layers[-1].operator
    torch.testing.assert_close(rwkv7.r_proj.weight @ rwkv7.r_proj.weight.T, torch.eye(WIDTH))
    assert not rwkv7.o_proj.weight.any()


def test_a_checkpoint_that_lacks_some_keeps_the_others(tmp_path: Path) -> None:
    model = SLMForCausalLM(SLMConfig(TEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=10.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [
        name for name in weights if re.search(r"dt_weight|features\.bias|decay_up_proj\.bias", name)
    ]
    assert len(lost) == 3
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = SLMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert all(state[name].abs().max() <= 0.5 for name in lost)
