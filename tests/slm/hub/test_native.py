"""Models as classes of transformers: what these give is what ours do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slm.architecture import Architecture
from slm.config import ConfigError
from slm.hub.formats import FormatConfig, special_tokens, write_model
from slm.hub.native import to_transformers
from slm.model import LanguageModel
from tests.slm.hub.conftest import build_model

ATTENTION = "attention(head_dim=8,query_groups=2{})"
FFN = "ffn(ratio=2.0)"
MAMBA2 = "mamba2(head_dim=16,state_size=8)"
RELU2 = "ffn(ratio=2.0,activation=relu2)"
QWEN3 = f"{ATTENTION.format(',qk_norm=True,window=5')} {FFN} "
QWEN3 += f"{ATTENTION.format(',qk_norm=True')} {FFN}"
MODELS = {
    "LlamaForCausalLM": ("", f"{ATTENTION.format(',rope_theta=500.0,rope_ntk=4.0')} {FFN} " * 2),
    "Qwen3ForCausalLM": ("norm_eps=1e-06", QWEN3),
    "Mamba2ForCausalLM": ("", f"{MAMBA2} {MAMBA2}"),
    "BambaForCausalLM": ("", f"{MAMBA2} {FFN} {ATTENTION.format('')} {FFN} {MAMBA2} {FFN}"),
}
VARIANTS = ["", "tie_embeddings=False", "normalize_logits=True"]


LOADED = """
import json, sys
# transformers takes their kernels where they are, whatever the device is.
sys.modules.update(fla=None, causal_conv1d=None, mamba_ssm=None)
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"], found
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, f"{folder}/{type(model).__name__}.logits")
"""
CASES = [(name, variant) for name in MODELS for variant in VARIANTS]


def build(name: str, variant: str) -> LanguageModel:
    fields, operators = MODELS[name]
    return build_model(f"{fields} {variant}", operators)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(64, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Each model as it is written, with the logits of what is loaded of it elsewhere."""
    found = []
    for name, variant in CASES:
        found.append(tmp_path_factory.mktemp(name))
        config = FormatConfig(format="native")
        write_model(build(name, variant), config, special_tokens(3), found[-1])
    command = [sys.executable, "-c", LOADED, json.dumps(tokens.tolist()), *map(str, found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_logits_are_the_same_after_saving_and_loading(
    case: int, folders: list[Path], tokens: Tensor
) -> None:
    name, variant = CASES[case]
    logits = load_file(folders[case] / f"{name}.logits")["logits"]
    with torch.no_grad():
        torch.testing.assert_close(logits, build(name, variant)(tokens), rtol=1e-4, atol=1e-5)
    config = json.loads((folders[case] / "config.json").read_text())
    assert config["eos_token_id"] == 3
    # A head that holds the norms cannot be the embedding.
    assert config["tie_word_embeddings"] == (variant == "")


def test_weights_keep_their_dtype() -> None:
    model = build_model("", MODELS["LlamaForCausalLM"][1]).bfloat16()
    assert {p.dtype for p in to_transformers(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            f"meta_tokens=2 | gla(head_dim=8) {FFN}",
            ["gla: is not among attention, mamba2, ffn", "meta_tokens: no class of transformers"],
        ),
        (f"| {FFN} {ATTENTION.format('')}", ["operators: must be a mixer and an ffn in turns"]),
        (f"| {ATTENTION.format('')} {FFN} {FFN}", ["operators: must be a mixer and an ffn"]),
        (
            f"norm_eps=1e-06 | {ATTENTION.format(',window=4')} {FFN} {MAMBA2} {RELU2}",
            [
                "ffn.activation: must be swiglu, got relu2",
                "attention.window: must be None, got 4",
                "norm_eps: must be 1e-05 with mamba2",
            ],
        ),
        (
            f"| {ATTENTION.format(',qk_norm=True')} {FFN} {ATTENTION.format('')} ffn(ratio=3.0)",
            [
                "ffn: must be equally wide everywhere, got [64, 96]",
                "attention.qk_norm: must be True, got False",
                "norm_eps: must be 1e-06 with attention.qk_norm",
            ],
        ),
    ],
)
def test_what_no_class_has_is_refused(text: str, problems: list[str]) -> None:
    model = LanguageModel(Architecture.parse(f"width=32 vocab_size=9 {text}"))
    with pytest.raises(ConfigError) as error:
        to_transformers(model)
    assert len(error.value.problems) == len(problems)
    for problem, expected in zip(error.value.problems, problems, strict=True):
        assert problem.startswith(expected)
