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
from slm.operators.mamba2 import Mamba2, Mamba2Config

__all__ = [
    "FFN",
    "OPERATORS",
    "Attention",
    "AttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "FFNConfig",
    "Mamba2",
    "Mamba2Config",
    "Operator",
    "OperatorConfig",
    "Sequence",
    "State",
    "parse_operator",
    "register",
]
