"""The operators: one file each, all on the interface of `slm.operators.base`."""

from slm.operators.attention import Attention, AttentionConfig
from slm.operators.base import (
    OPERATORS,
    Operator,
    OperatorConfig,
    Sequence,
    State,
    parse_operator,
    register,
)
from slm.operators.deltanet import DeltaNet, DeltaNetConfig
from slm.operators.ffn import FFN, FFNConfig
from slm.operators.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from slm.operators.gla import GLA, GLAConfig
from slm.operators.kda import KDA, KDAConfig
from slm.operators.linear_attention import LinearAttention, LinearAttentionConfig
from slm.operators.mamba import Mamba, MambaConfig
from slm.operators.mamba2 import Mamba2, Mamba2Config
from slm.operators.rwkv7 import RWKV7, RWKV7Config
from slm.operators.short_convolution import ShortConvolution, ShortConvolutionConfig

__all__ = [
    "FFN",
    "GLA",
    "KDA",
    "OPERATORS",
    "RWKV7",
    "Attention",
    "AttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "FFNConfig",
    "GLAConfig",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "KDAConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "Operator",
    "OperatorConfig",
    "RWKV7Config",
    "Sequence",
    "ShortConvolution",
    "ShortConvolutionConfig",
    "State",
    "parse_operator",
    "register",
]
