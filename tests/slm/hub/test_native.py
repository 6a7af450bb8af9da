"""Models as classes of transformers: what these give is what ours do."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm.architecture import Architecture
from slm.config import ConfigError
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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_same_after_saving_and_loading(
    name: str, variant: str, tmp_path: Path
) -> None:
    fields, operators = MODELS[name]
    model = build_model(f"{fields} {variant}", operators)
    theirs = to_transformers(model, end_of_text=3)
    theirs.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == name
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.eos_token_id == 3
    # A head that holds the norms cannot be the embedding.
    assert loaded.config.tie_word_embeddings == (variant == "")
    tokens = torch.randint(64, (2, 21))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)


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
