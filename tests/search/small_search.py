"""What makes a search a matter of seconds: a small text, few tokens, hasty measurements."""

import random
from pathlib import Path
from typing import Any

from omegaconf import open_dict

from search.config import SearchConfig, read_config
from slm.config import compose

NUM_CANDIDATES = 6
SETTINGS: dict[str, Any] = {
    "tokenizer": {"vocab_size": 300},
    "workload": {"prompt_tokens": 4, "new_tokens": 4},
    "protocol": {
        "max_seconds": 0.05,
        "max_repeats": 0,
        "warmup_rounds": 1,
        "max_interval_percent": 20.0,
        # The compiler would take longer than all else; one test of the operator study has it.
        "compile_unit": "eager",
    },
    "proxy": {
        "rung_tokens": [320],
        "batch_size": 4,
        "sequence_tokens": 8,
        "validation_tokens": 128,
        "time_limit_s": 300,
    },
    "accuracy_items": 20,
    "training_threads": 1,
}


def small_text(folder: Path) -> dict[str, Any]:
    """The `data` of a config: a hundred documents of invented words, written into a folder."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(60)]
    sentences = [" ".join(rng.choices(words, k=8)) + "." for _ in range(3000)]
    documents = [" ".join(sentences[i : i + 30]) for i in range(0, 3000, 30)]
    path = folder / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return {"files": [str(path)], "cache_dir": str(folder / "cache")}


def compose_tiny(experiment: list[str], *overrides: str) -> SearchConfig:
    """The config of the arguments that the fixture `experiment` gives, and further ones."""
    config_dir = Path(experiment[1])
    composed = compose("search", [*experiment[2:], *overrides], config_dir=config_dir)[0]
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)
