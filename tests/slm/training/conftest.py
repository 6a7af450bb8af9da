"""A tiny run on tiny text, the same on every machine."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slm.config import read
from slm.training.config import TrainConfig

WORDS = [
    "the",
    "sun",
    "moon",
    "sea",
    "king",
    "fool",
    "night",
    "storm",
    "loves",
    "sees",
    "but",
    "so",
]
MODEL = {
    "width": 32,
    "depth": 1,
    "meta_tokens": 2,
    "blocks": {
        "A": {
            "operators": [
                "attention(head_dim=16)",
                "ffn(ratio=1.0)",
                "mamba2(head_dim=16,state_size=8)",
                "deltanet(head_dim=16)",
            ]
        }
    },
}
TRAINER = {
    "max_steps": 8,
    "batch_tokens": 96,
    "sequence_tokens": 24,
    "micro_batch_size": 2,
    "validate_every_steps": 3,
    "validation_tokens": 240,
    "checkpoint_every_steps": 4,
    "log_every_steps": 1,
    "sample_tokens": 4,
    "accelerator": "cpu",
    "precision": "float32",
}
ConfigMaker = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def make_config(text_file: Path) -> ConfigMaker:
    """Build a run's config; each argument replaces fields of a section or, if plain, a field."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": MODEL,
            "data": {
                "source": "text",
                "files": [str(text_file)],
                "validation_fraction": 0.25,
                "cache_dir": str(text_file.parent / "cache"),
            },
            "tokenizer": {"name": "bpe", "vocab_size": 300},
            "trainer": TRAINER,
            "optimizer": {"lr": 1e-2, "warmup_steps": 2},
        }
        for key, change in changes.items():
            values[key] = values.get(key, {}) | change if isinstance(change, dict) else change
        return read(TrainConfig, values)

    return make
