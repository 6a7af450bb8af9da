"""A space of operators small enough to train within a test."""

from search.space import SpaceConfig
from slm.config import read

ATTENTION, WINDOW = "attention(head_dim=16)", "attention(head_dim=16,window=8)"
MAMBA2, DELTANET = "mamba2(head_dim=16,state_size=8)", "deltanet(head_dim=16)"
FFN, WIDE_FFN = "ffn(ratio=2.0)", "ffn(ratio=4.0)"


def space_config(**changes: object) -> SpaceConfig:
    """A space of small operators; `changes` replace fields."""
    fields = {
        "mixers": [ATTENTION, WINDOW, MAMBA2, DELTANET],
        "ffns": [FFN],
        "ratios": ["0:1", "1:1", "1:2", "1:3"],
        "ffns_per_mixer": [0, 1, 2],
        "max_block_types": 3,
        "max_blocks": 8,
        "max_operators": 12,
        "widths": [16, 32, 48],
        "seeds": {
            "transformer": {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 2},
            "hybrid": {
                "blocks": {
                    "A": {"operators": [DELTANET, FFN]},
                    "B": {"operators": [ATTENTION, FFN]},
                },
                "pattern": "AAB",
                "depth": 3,
            },
        },
        "reference": {"seed": "transformer", "width": 32},
    }
    return read(SpaceConfig, {**fields, **changes}, "space")


def factors_config(**changes: object) -> SpaceConfig:
    """The space in which the kind of FFN, the meta tokens and the width are factors, too."""
    transformer = {"blocks": {"A": {"operators": [ATTENTION, FFN]}}, "depth": 2}
    fields = {
        "ffns": [FFN, WIDE_FFN],
        "meta_tokens": [0, 4, 8],
        "width": "free",
        "seeds": {
            "transformer": transformer,
            "narrow": {**transformer, "meta_tokens": 4, "width": 16},
        },
    }
    return space_config(**{**fields, **changes})
