"""NVIDIA's layout of Nemotron-Flash: the fields of its config and the names of its weights.

Models in it are read, the released ones too, and written, for NVIDIA's own code to load. It knows
DeltaNet, Mamba2, attention and FFN, each of one shape in all of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, fields
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from slm.architecture import Architecture
from slm.config import ConfigError, read, schema
from slm.hub.layout import ATTENTION_NAMES, Common, Layout, ffn_names, mamba2_names
from slm.model import LanguageModel
from slm.operators import OperatorConfig
from slm.operators.attention import AttentionConfig
from slm.operators.deltanet import DeltaNetConfig
from slm.operators.ffn import FFNConfig
from slm.operators.mamba2 import Mamba2Config

MODEL_TYPE = "nemotron_flash"
LayerType = Literal["deltanet", "m", "m2", "a", "f"]
# Their name of a layer by ours of its operator.
LAYER_TYPES: dict[str, LayerType] = {
    "deltanet": "deltanet",
    "mamba2": "m2",
    "attention": "a",
    "ffn": "f",
}
# Our name of an FFN's activation by theirs.
ACTIVATIONS = {"silu": "swiglu", "relu2": "relu2"}
# What hidden widths of an FFN are multiples of.
FFN_MULTIPLE = 128
# The only width of DeltaNet's convolutions.
DELTANET_CONV_WIDTH = 4
# Their Mamba2 kernels want the number of heads to be a multiple of it.
MAMBA2_HEADS_MULTIPLE = 8

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYOUT = Layout(
    model={
        "embedding.weight": EMBEDDING,
        "meta_tokens": "model.memory_tokens",
        "norm.weight": "model.final_layernorm.weight",
        "head.weight": HEAD,
    },
    operators={
        "attention": ATTENTION_NAMES,
        "deltanet": {
            "norm.weight": "input_layernorm.weight",
            "operator.qkv_proj.weight": "gla.{}_proj.weight",
            "operator.convolution.weight": "gla.{}_conv1d.weight",
            "operator.beta_proj.weight": "gla.b_proj.weight",
            "operator.o_norm.weight": "gla.o_norm.weight",
            "operator.o_proj.weight": "gla.o_proj.weight",
        },
        "mamba2": mamba2_names("input_layernorm", "mamba"),
        "ffn": ffn_names("pre_ffn_layernorm", "ffn"),
    },
)


@schema
class NemotronFlashConfig:
    """The fields of their config.json that count, with their defaults.

    hidden_size: the width. num_memory_tokens: the meta tokens.
    layer_types: one per operator; 'm' and 'm2' are the same.
    num_attention_heads: of DeltaNet too. num_key_value_heads: None: as many.
    intermediate_size: of a network within the mixers' layers; below 1: there is none.
    sliding_window: keys before a query that it sees, in layers that are not in global_attn_idx.
    """

    architectures: list[str] = field(default_factory=lambda: ["NemotronFlashForCausalLM"])
    model_type: str = MODEL_TYPE
    vocab_size: int = 65536
    tie_word_embeddings: bool = False
    hidden_size: Annotated[int, Field(gt=0)] = 4096
    intermediate_size: int = 14336
    ffn_expand_ratio: float | None = None
    mlp_hidden_act: Literal["silu", "relu2"] = "silu"
    num_hidden_layers: int = 32
    layer_types: list[LayerType]
    num_attention_heads: Annotated[int, Field(gt=0)] = 32
    num_key_value_heads: Annotated[int, Field(gt=0)] | None = 8
    attn_hidden_size: int = -1
    kq_head_dim: int = -1
    v_head_dim: int = -1
    kq_norm: Literal["none", "rms"] | None = None
    rope: bool = False
    rope_type: Literal["default", "ntk"] | None = None
    rope_theta: float = 10000.0
    max_position_embeddings: Annotated[int, Field(gt=0)] = 262144
    orig_max_position_embeddings: Annotated[int, Field(gt=0)] | None = None
    sliding_window: Annotated[int, Field(ge=0)] | None = None
    global_attn_idx: list[int] | None = None
    attn_implementation_new: Literal["flash_attention_2", "fused_mha", "sdpa"] = "flash_attention_2"
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba2_headdim: int = 64
    num_memory_tokens: int = 0
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        kinds, problems = set(self.layer_types), []
        if len(self.layer_types) != self.num_hidden_layers:
            problems.append(
                f"num_hidden_layers: must be that of layer_types, {len(self.layer_types)}, "
                f"got {self.num_hidden_layers}"
            )
        if self.intermediate_size > 0 and kinds - {"f"}:
            problems.append(
                "intermediate_size: must be below 1, for layers here are one operator, "
                f"got {self.intermediate_size}"
            )
        if "f" in kinds and self.ffn_expand_ratio is None:
            problems.append("ffn_expand_ratio: must be given where there are layers 'f'")
        if "a" in kinds:
            for name in ("attn_hidden_size", "kq_head_dim", "v_head_dim"):
                if getattr(self, name) > 0:
                    problems.append(f"{name}: must be -1, got {getattr(self, name)}")
            if not self.rope:
                problems.append("rope: must be true, for attention here rotates")
            if self.attn_implementation_new == "sdpa" and self._is_beyond_sdpa:
                problems.append(
                    "attn_implementation_new: 'sdpa' knows no norms of q and k, NTK or windows"
                )
            if self.kq_norm is None:
                problems.append("kq_norm: must be 'none' or 'rms', got None")
        if self.rope_type == "ntk" and self.orig_max_position_embeddings is None:
            problems.append("orig_max_position_embeddings: must be given with rope_type 'ntk'")
        if kinds & {"a", "deltanet"} and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"num_attention_heads: must divide hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        elif "a" in kinds and self.num_attention_heads % self.num_kv_heads:
            problems.append(
                f"num_key_value_heads: must divide num_attention_heads {self.num_attention_heads}, "
                f"got {self.num_kv_heads}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def _is_beyond_sdpa(self) -> bool:
        return self.kq_norm == "rms" or self.rope_type == "ntk" or self.sliding_window is not None

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of attention."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rope_ntk(self) -> float:
        """As in `slm.operators.attention.AttentionConfig`."""
        if self.rope_type != "ntk" or self.orig_max_position_embeddings is None:
            return 1.0
        return self.max_position_embeddings / self.orig_max_position_embeddings

    def architecture(self) -> Architecture:
        """The architecture that this stands for; raises ValueError if there is no such one."""
        operators = (self._operator(number) for number in range(len(self.layer_types)))
        return Architecture(
            width=self.hidden_size,
            vocab_size=self.vocab_size,
            operators=tuple(operators),
            meta_tokens=self.num_memory_tokens,
            tie_embeddings=self.tie_word_embeddings,
            normalize_logits=True,
            norm_eps=self.rms_norm_eps,
        )

    def _operator(self, number: int) -> OperatorConfig:
        match self.layer_types[number]:
            case "deltanet":
                return DeltaNetConfig(head_dim=self.hidden_size // self.num_attention_heads)
            case "m" | "m2":
                return Mamba2Config(
                    expand=self.mamba_expand,
                    head_dim=self.mamba2_headdim,
                    state_size=self.mamba_d_state,
                    conv_width=self.mamba_d_conv,
                )
            case "a":
                return AttentionConfig(
                    head_dim=self.hidden_size // self.num_attention_heads,
                    query_groups=self.num_attention_heads // self.num_kv_heads,
                    window=self._window(number),
                    qk_norm=self.kq_norm == "rms",
                    rope_theta=self.rope_theta,
                    rope_ntk=self.rope_ntk,
                )
            case _:
                return FFNConfig(
                    ratio=self.ffn_expand_ratio or 0.0,
                    multiple_of=FFN_MULTIPLE,
                    activation=ACTIVATIONS[self.mlp_hidden_act],
                )

    def _window(self, number: int) -> int | None:
        """Theirs counts the keys before the query, ours the query's own too."""
        if self.sliding_window is None or number in (self.global_attn_idx or []):
            return None
        return self.sliding_window + 1


def is_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this layout, under whatever name."""
    return config.get("model_type") == MODEL_TYPE or {"layer_types", "num_memory_tokens"} <= set(
        config
    )


def read_config(config: Mapping[str, Any]) -> NemotronFlashConfig:
    """What a config.json says; raises ConfigError with everything in it that cannot be had."""
    known = {item.name for item in fields(NemotronFlashConfig)}
    return read(NemotronFlashConfig, {name: config[name] for name in sorted(known & set(config))})


def read_model(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LanguageModel:
    """The model of a config.json and its weights, in their dtype.

    Raises ConfigError with everything in them that is unknown, missing or of another shape.
    """
    architecture = read_config(config).architecture()
    own = dict(weights)
    if architecture.tie_embeddings:
        head = own.pop(HEAD, None)
        if head is not None and not head.equal(own.get(EMBEDDING, head)):
            raise ConfigError([f"{HEAD}: is tied to {EMBEDDING}, but holds something else"])
    return LAYOUT.to_ours(own, architecture, _prefixes(architecture))


def write_config(
    architecture: Architecture,
    special: Mapping[str, Any] = MappingProxyType({}),
    context_tokens: int = 4096,
) -> NemotronFlashConfig:
    """What stands for `architecture` in this layout.

    special: ids of special tokens, by their names in it. context_tokens: the longest context; with
    NTK scaling that which it starts from. Raises ConfigError with everything that keeps it from
    being expressed.
    """
    common = Common(architecture)
    common.require_names(list(LAYER_TYPES))
    common.require("deltanet", "conv_width", DELTANET_CONV_WIDTH)
    common.require("attention", "pinned_tokens", 0)
    if not architecture.normalize_logits:
        common.problems.append("normalize_logits: must be True, for their code divides always")
    heads = _num_heads(common)
    mamba2 = _mamba2(common)
    windows = {each.window for each in common.operators("attention")} - {None}
    if len(windows) > 1:
        common.problems.append(f"attention.window: must be None or one, got {sorted(windows)}")
    ntk = common.value("attention", "rope_ntk", 1.0)
    longest = context_tokens * ntk
    if not float(longest).is_integer():
        common.problems.append(
            f"attention.rope_ntk: must be a multiple of 1/{context_tokens}, got {ntk}"
        )
    values = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // common.value("attention", "query_groups", 1),
        "kq_norm": "rms" if common.value("attention", "qk_norm", False) else "none",
        "rope_theta": common.value("attention", "rope_theta", 10000.0),
        "ffn_expand_ratio": _ffn_ratio(common),
        "mlp_hidden_act": _activation(common),
    }
    common.check()
    layers = architecture.operators
    full = [n for n, each in enumerate(layers) if getattr(each, "window", 0) is None]
    return NemotronFlashConfig(
        vocab_size=architecture.vocab_size,
        tie_word_embeddings=architecture.tie_embeddings,
        hidden_size=architecture.width,
        intermediate_size=-1,
        num_hidden_layers=len(layers),
        layer_types=[LAYER_TYPES[each.name] for each in layers],
        rope=True,
        rope_type="ntk" if ntk > 1 else "default",
        max_position_embeddings=int(longest),
        orig_max_position_embeddings=context_tokens,
        sliding_window=windows.pop() - 1 if windows else None,
        global_attn_idx=full,
        mamba_d_state=mamba2.state_size,
        mamba_d_conv=mamba2.conv_width,
        mamba_expand=mamba2.expand,
        mamba2_headdim=mamba2.head_dim,
        num_memory_tokens=architecture.meta_tokens,
        rms_norm_eps=architecture.norm_eps,
        **special,
        **values,
    )


def write_model(model: LanguageModel) -> dict[str, Tensor]:
    """The weights of `model` under their names, for an architecture that can be expressed."""
    return LAYOUT.to_theirs(model, _prefixes(model.architecture))


def _prefixes(architecture: Architecture) -> list[str]:
    return [f"model.layers.{number}." for number in range(len(architecture.operators))]


def _num_heads(common: Common) -> int:
    """Heads of attention and DeltaNet, which are as many."""
    sizes = {common.value(name, "head_dim") for name in ("attention", "deltanet")} - {None}
    if len(sizes) > 1:
        common.problems.append(
            f"deltanet.head_dim: must be attention's, got {sorted(sizes)} for the two"
        )
    return common.architecture.width // sizes.pop() if sizes else 1


def _mamba2(common: Common) -> Mamba2Config:
    """The one shape of Mamba2; the default where there is none."""
    shape = Mamba2Config(
        **{
            item.name: common.value("mamba2", item.name, item.default)
            for item in fields(Mamba2Config)
        }
    )
    _, num_heads, _ = shape.sizes(common.architecture.width)
    if common.operators("mamba2") and num_heads % MAMBA2_HEADS_MULTIPLE:
        common.problems.append(
            f"mamba2.head_dim: must make the number of heads a multiple of "
            f"{MAMBA2_HEADS_MULTIPLE}, got {num_heads} heads"
        )
    return shape


def _activation(common: Common) -> str:
    ours = common.value("ffn", "activation", "swiglu")
    return next(theirs for theirs, name in ACTIVATIONS.items() if name == ours)


def _ffn_ratio(common: Common) -> float | None:
    """Hidden width over width, such that theirs comes out as ours does."""
    if not common.operators("ffn"):
        return None
    width, wide = common.architecture.width, common.ffn_hidden()
    if wide % FFN_MULTIPLE:
        common.problems.append(
            f"ffn.ratio: must make the hidden width a multiple of {FFN_MULTIPLE}, got {wide}"
        )
    # Their product with the width, cut to a whole number, must not fall just short of it.
    exact = math.nextafter(wide / width, math.inf)
    given = common.operators("ffn")[0].ratio
    fits = int(given * width) // FFN_MULTIPLE * FFN_MULTIPLE == wide
    return float(given) if fits else exact
