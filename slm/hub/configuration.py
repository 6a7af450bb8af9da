"""The model's configuration for transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from transformers import PretrainedConfig

from slm.architecture import Architecture

# transformers makes a config without arguments to tell which values differ from the defaults.
SMALLEST = "width=32 vocab_size=1 | ffn"


class SLMConfig(PretrainedConfig):
    """Holds the architecture in its canonical text, and what tools expect to find beside it.

    architecture: text of the `slm.architecture.Architecture`, the one source of all shapes.
    vocab_size: replaces the text's; `resize_token_embeddings` changes it.
    hidden_size, num_hidden_layers, tie_word_embeddings: follow from the architecture; a layer is
        one operator. Raises ValueError if they are given and say something else.
    """

    model_type = "slm_frontier"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        architecture: str = SMALLEST,
        vocab_size: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if __name__ == "slm.hub.configuration":
            # Beside what is saved from here lies no code: only an export says where it is.
            kwargs.pop("auto_map", None)
        parsed = Architecture.parse(architecture)
        if vocab_size is not None:
            parsed = replace(parsed, vocab_size=vocab_size)
        self.architecture = str(parsed)
        self.vocab_size = parsed.vocab_size
        self.use_cache = use_cache
        derived: dict[str, Any] = {
            "hidden_size": parsed.width,
            "num_hidden_layers": len(parsed.operators),
            "tie_word_embeddings": parsed.tie_embeddings,
        }
        for field, value in derived.items():
            given = kwargs.pop(field, value)
            if given != value:
                raise ValueError(f"{field}: the architecture says {value}, got {given}")
        super().__init__(**kwargs, **derived)
