"""A space of operators small enough to train within a test."""

from search.space import SpaceConfig
from slm.config import read

ATTENTION, WINDOW = "attention(head_dim=16)", "attention(head_dim=16,window=8)"
MAMBA2, DELTANET = "mamba2(head_dim=16,state_size=8)", "deltanet(head_dim=16)"
FFN = "ffn(ratio=2.0)"


def space_config(**changes: object) -> SpaceConfig:
    """A space of small operators; `changes` replace fields."""
    fields = {
        "mixers": [ATTENTION, WINDOW, MAMBA2, DELTANET],
        "ffn": FFN,
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
