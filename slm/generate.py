"""Text from a trained model, as it is generated.

python -m slm.generate checkpoint=runs/train prompt="To be"
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from omegaconf import DictConfig
from pydantic import Field

from slm.compilation import compiler_problems
from slm.config import ConfigError, entry_point, read, schema
from slm.decoding_step import CompileUnit, is_compiled
from slm.generation import Decoder
from slm.hub.loading import load_model_and_tokenizer
from slm.kernels.backend import set_backend
from slm.runtime import RuntimeConfig


@schema
class GenerateConfig(RuntimeConfig):
    """What to generate from, and how.

    checkpoint: a `.ckpt` file, a run's folder, an export or a folder of Nemotron-Flash.
    temperature, top_k, top_p: as in `slm.generation.Sampler`.
    compile_unit: what of a step is compiled as one, once for a model's shapes, see
        `slm.decoding_step`; None: a whole step if that has been done before, else nothing.
    """

    checkpoint: Path
    prompt: str = ""
    new_tokens: Annotated[int, Field(gt=0)] = 200
    temperature: Annotated[float, Field(ge=0)] = 0.8
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    compile_unit: CompileUnit | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint.exists():
            problems.append(f"checkpoint: '{self.checkpoint}': no such file or folder")
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("device: 'cuda': there is no GPU")
        if self.compile_unit not in (None, "eager"):
            problems += compiler_problems("compile_unit", str(self.compile_unit))
        if problems:
            raise ConfigError(problems)

    @property
    def device_type(self) -> str:
        """'cuda' or 'cpu': where the model runs."""
        return super().device_type if self.device == "auto" else self.device


def stream(config: GenerateConfig) -> Iterator[str]:
    """Yield the text that follows the prompt, piece by piece, until the model ends it."""
    from tokenizers.decoders import DecodeStream

    set_backend(config.backend)
    model, tokenizer, stops = load_model_and_tokenizer(config.checkpoint)
    model = model.to(config.device_type)
    # The end of text comes first, as in training.
    prompt = tokenizer.encode(config.prompt).ids
    if not prompt:
        raise ConfigError(["prompt: must hold a token, for this tokenizer puts none before it"])
    tokens = torch.tensor([prompt], device=model.norm.weight.device)

    max_tokens = tokens.shape[1] + config.new_tokens
    unit = config.compile_unit
    if unit is None:
        unit = "step" if is_compiled(model, max_tokens, 1, "step") else "eager"
    decoder = Decoder(model, max_tokens, compile_unit=unit)
    decode = DecodeStream(skip_special_tokens=True)
    for token in decoder.generate(
        tokens,
        config.new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_tokens=stops,
    ):
        # None in the middle of a character.
        piece = decode.step(tokenizer, int(token))
        if piece is not None:
            yield piece


def _check(config: DictConfig) -> GenerateConfig:
    return read(GenerateConfig, config)


@entry_point("generate", _check)
def main(config: DictConfig) -> None:
    """Print the prompt and what follows it."""
    settings = _check(config)
    print(settings.prompt, end="", flush=True)
    for piece in stream(settings):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
