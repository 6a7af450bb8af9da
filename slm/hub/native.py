"""Models as classes that transformers itself has, which servers know without further code.

Llama, Qwen3, Mamba2 and Bamba. Nemotron-H is not among them: its attention knows no positions, and
without attention the cache of transformers 5.23 fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slm.architecture import Architecture
from slm.hub.layout import ATTENTION_NAMES, Common, Layout, ffn_names, mamba2_names
from slm.model import LanguageModel
from slm.operators import OperatorConfig

# Epsilons of norms within operators, where these classes have the one of the model.
QK_NORM_EPS = 1e-6
MAMBA2_NORM_EPS = 1e-5


def _model(base: str, embedding: str, norm: str) -> Mapping[str, str]:
    return {
        "embedding.weight": f"{base}.{embedding}.weight",
        "norm.weight": f"{base}.{norm}.weight",
        "head.weight": "lm_head.weight",
    }


@dataclass(frozen=True)
class Family:
    """A class of transformers.

    name: of the class, and of its config, without what all end with. layers: what the names of its
        layers begin with. operators_per_layer: one, or a mixer and an FFN.
    """

    name: str
    layout: Layout
    layers: str = "model.layers"
    operators_per_layer: int = 2


LLAMA_LAYOUT = Layout(
    _model("model", "embed_tokens", "norm"),
    {"attention": ATTENTION_NAMES, "ffn": ffn_names("post_attention_layernorm", "mlp")},
)
LLAMA = Family("Llama", LLAMA_LAYOUT)
QWEN3 = Family("Qwen3", LLAMA_LAYOUT)
BAMBA = Family(
    "Bamba",
    Layout(
        _model("model", "embed_tokens", "final_layernorm"),
        {
            "attention": ATTENTION_NAMES,
            "mamba2": mamba2_names("input_layernorm", "mamba"),
            "ffn": ffn_names("pre_ff_layernorm", "feed_forward"),
        },
    ),
)
MAMBA2 = Family(
    "Mamba2",
    Layout(_model("backbone", "embeddings", "norm_f"), {"mamba2": mamba2_names("norm", "mixer")}),
    layers="backbone.layers",
    operators_per_layer=1,
)


def to_transformers(
    model: LanguageModel,
    special: Mapping[str, Any] = MappingProxyType({"pad_token_id": 0}),
    context_tokens: int = 4096,
) -> PreTrainedModel:
    """The model of transformers that computes what `model` does, in evaluation mode.

    The division of logits by the norms of the head's rows goes into a head of its own.
    special: ids of special tokens, by their names in configs. context_tokens: what servers take for
        the longest context. Raises ConfigError with everything that none of its classes has.
    """
    import transformers

    family, config = _family_and_config(model.architecture)
    config |= special
    if family is not MAMBA2:
        config["max_position_embeddings"] = context_tokens
    made = getattr(transformers, f"{family.name}Config")(**config)
    weights = family.layout.to_theirs(model, _prefixes(family, model.architecture))
    weights |= _head(model)
    theirs: PreTrainedModel
    theirs, found = getattr(transformers, f"{family.name}ForCausalLM").from_pretrained(
        None,
        config=made,
        state_dict=weights,
        dtype=model.norm.weight.dtype,
        output_loading_info=True,
    )
    assert not found["missing_keys"] | found["unexpected_keys"], found
    return theirs


@torch.no_grad()
def _head(model: LanguageModel) -> dict[str, Tensor]:
    """The head; one of its own where logits are normalised."""
    norms = model.row_norms()
    weight = model.head_weight
    return {"lm_head.weight": weight if norms is None else weight / norms[:, None]}


def _prefixes(family: Family, architecture: Architecture) -> list[str]:
    numbers = range(len(architecture.operators))
    return [f"{family.layers}.{number // family.operators_per_layer}." for number in numbers]


def _family_and_config(architecture: Architecture) -> tuple[Family, dict[str, Any]]:
    """The family that has the architecture, and the fields of its config."""
    common = Common(architecture)
    common.require_names(["attention", "mamba2", "ffn"])
    if architecture.meta_tokens:
        common.problems.append(
            f"meta_tokens: no class of transformers has them, got {architecture.meta_tokens}"
        )
    common.check()
    family = _family(common)
    if family.operators_per_layer == 2:
        _require_pairs(common)
    config: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.width,
        "num_hidden_layers": len(architecture.operators) // family.operators_per_layer,
        "tie_word_embeddings": architecture.tie_embeddings and not architecture.normalize_logits,
    }
    if common.operators("ffn"):
        config |= _ffn_fields(common)
    if common.operators("attention"):
        config |= _attention_fields(common, family)
    if common.operators("mamba2"):
        config |= _mamba2_fields(common, family)
    eps = "layer_norm_epsilon" if family is MAMBA2 else "rms_norm_eps"
    config[eps] = architecture.norm_eps
    common.check()
    return family, config


def _family(common: Common) -> Family:
    """The family that comes nearest; what it has not got is found later."""
    if common.operators("attention"):
        if common.operators("mamba2"):
            return BAMBA
        return QWEN3 if any(each.qk_norm for each in common.operators("attention")) else LLAMA
    return BAMBA if common.operators("ffn") else MAMBA2


def _require_pairs(common: Common) -> None:
    """It is a problem unless mixers and FFNs take turns."""
    names = [each.name for each in common.architecture.operators]
    is_paired = len(names) % 2 == 0 and all(
        (name == "ffn") == (number % 2 == 1) for number, name in enumerate(names)
    )
    if not is_paired:
        common.problems.append(f"operators: must be a mixer and an ffn in turns, got {names}")


def _ffn_fields(common: Common) -> dict[str, Any]:
    common.require("ffn", "activation", "swiglu")
    return {"intermediate_size": common.ffn_hidden()}


def _attention_fields(common: Common, family: Family) -> dict[str, Any]:
    common.require("attention", "qk_norm", family is QWEN3)
    common.require("attention", "pinned_tokens", 0)
    if family is QWEN3 and common.architecture.norm_eps != QK_NORM_EPS:
        common.problems.append(
            f"norm_eps: must be {QK_NORM_EPS} with attention.qk_norm, for they have one, "
            f"got {common.architecture.norm_eps}"
        )
    head_dim = common.value("attention", "head_dim")
    num_heads = common.architecture.width // head_dim
    rope = {"rope_type": "default", "rope_theta": common.value("attention", "rope_base")}
    fields: dict[str, Any] = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads // common.value("attention", "query_groups"),
    }
    if family is BAMBA:
        # Its default rotates half of a head.
        rope["partial_rotary_factor"] = 1.0
        layers = common.architecture.operators[::2]
        fields["attn_layer_indices"] = [n for n, each in enumerate(layers) if _is_attention(each)]
    else:
        fields["head_dim"] = head_dim
    if family is QWEN3:
        fields |= _window_fields(common)
    else:
        common.require("attention", "window", None)
    return fields | {"rope_parameters": rope}


def _window_fields(common: Common) -> dict[str, Any]:
    windows = [each.window for each in common.operators("attention")]
    sizes = sorted(set(windows) - {None})
    if len(sizes) > 1:
        common.problems.append(f"attention.window: must be None or one, got {sizes}")
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "layer_types": kinds,
    }


def _is_attention(operator: OperatorConfig) -> bool:
    return operator.name == "attention"


def _mamba2_fields(common: Common, family: Family) -> dict[str, Any]:
    if common.architecture.norm_eps != MAMBA2_NORM_EPS:
        common.problems.append(
            f"norm_eps: must be {MAMBA2_NORM_EPS} with mamba2, for they have one, "
            f"got {common.architecture.norm_eps}"
        )
    sizes = {"expand", "head_dim", "state_size", "conv_width"}
    values = {name: common.value("mamba2", name) for name in sorted(sizes)}
    heads = values["expand"] * common.architecture.width // values["head_dim"]
    if family is BAMBA:
        return {
            "mamba_expand": values["expand"],
            "mamba_n_heads": heads,
            "mamba_d_head": values["head_dim"],
            "mamba_d_state": values["state_size"],
            "mamba_d_conv": values["conv_width"],
            "mamba_n_groups": 1,
        }
    return {
        "expand": values["expand"],
        "num_heads": heads,
        "head_dim": values["head_dim"],
        "state_size": values["state_size"],
        "conv_kernel": values["conv_width"],
        "n_groups": 1,
        "residual_in_fp32": False,
    }
