"""The formats in which a model is written for others to load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from slm.architecture import Architecture
from slm.config import ConfigError, schema
from slm.data.tokenizer import end_of_text_id, load_tokenizer
from slm.hub import nemotron_flash
from slm.hub.flatten import flatten
from slm.hub.loading import CONFIG_FILE
from slm.hub.weights import MAX_SHARD_SIZE, write_weights
from slm.model import LanguageModel
from slm.operators import OPERATORS
from slm.runtime import PluginsConfig
from slm.training.checkpoint import TOKENIZER_FILE

# As the Hub spells it; it stands in the card's YAML.
LicenseName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Format = Literal["slm", "nemotron_flash", "native"]

ENTRIES = ("slm.hub.configuration", "slm.hub.modeling")
AUTO_MAP = {
    "AutoConfig": "slm_hub_configuration.SLMConfig",
    "AutoModelForCausalLM": "slm_hub_modeling.SLMForCausalLM",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Ids by these names: what begins and ends a text, and pads. Several may end it.
SpecialTokens = dict[str, Any]


@schema
class FormatConfig(PluginsConfig):
    """How a model is written.

    format: 'slm', what transformers loads with the code beside it; 'nemotron_flash', NVIDIA's
        layout; 'native', a class that transformers has itself.
    dtype: of the weights; None: the one they have.
    context_tokens: longest context that servers take the model for, where a format holds it.
    prompt, new_tokens: of the sample that the self-check generates.
    """

    format: Format = "slm"
    dtype: Literal["float32", "bfloat16"] | None = None
    context_tokens: Annotated[int, Field(gt=0)] = 4096
    prompt: str = "The "
    new_tokens: Annotated[int, Field(gt=0)] = 64


def special_tokens(end_of_text: int) -> SpecialTokens:
    """Those of a model for which one token begins and ends a text, and pads."""
    return dict.fromkeys(SPECIAL_TOKENS, end_of_text)


def write_model(
    model: LanguageModel, config: FormatConfig, special: SpecialTokens, folder: Path
) -> None:
    """Write config, generation config and weights, and where needed code, into `folder`.

    Raises ConfigError with everything that keeps the format from holding the model.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if config.dtype is not None:
        model = model.to(getattr(torch, config.dtype))
    WRITERS[config.format](model, config, special, folder)


def write_tokenizer(tokenizer_file: Path, folder: Path, chat_template: str | None = None) -> int:
    """Write the tokenizer as transformers wants it; the id of its end of text.

    chat_template: in Jinja, what makes a text of a conversation.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = load_tokenizer(tokenizer_file)
        end_of_text = end_of_text_id(tokenizer)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    token = tokenizer.id_to_token(end_of_text)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token,
        eos_token=token,
        pad_token=token,
        padding_side="left",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # As it was trained with, untouched by the wrapper.
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    return end_of_text


def is_plugin(module: str) -> bool:
    """Whether an operator's module lies outside this package."""
    return module.partition(".")[0] != __package__.partition(".")[0]


def _write_slm(
    model: LanguageModel, config: FormatConfig, special: SpecialTokens, folder: Path
) -> None:
    from transformers import GenerationConfig

    from slm.hub.configuration import SLMConfig
    from slm.hub.modeling import SLMForCausalLM

    # Built without storage: the weights are those of `model`.
    with torch.device("meta"):
        shell = SLMForCausalLM(SLMConfig(str(model.architecture), **special))
    shell.config.auto_map = AUTO_MAP
    shell.model = model
    shell.generation_config = GenerationConfig(**special)
    shell.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for name, text in _code(model).items():
        (folder / name).write_text(text, encoding="utf-8")


def _code(model: LanguageModel) -> dict[str, str]:
    """The code of a model's classes, and of the operators that it has, as files by name."""
    from slm.hub.configuration import SMALLEST

    parsed = (model.architecture, Architecture.parse(SMALLEST))
    used = {OPERATORS[each.name].__module__ for one in parsed for each in one.operators}
    others = {operator.__module__ for operator in OPERATORS.values()} - used
    return flatten(ENTRIES, sorted(filter(is_plugin, used)), others)


def _write_nemotron_flash(
    model: LanguageModel, config: FormatConfig, special: SpecialTokens, folder: Path
) -> None:
    from transformers import GenerationConfig

    written = nemotron_flash.write_config(model.architecture, special, config.context_tokens)
    values = dataclasses.asdict(written) | {"dtype": str(model.norm.weight.dtype).split(".")[1]}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    GenerationConfig(**special).save_pretrained(folder)
    write_weights(nemotron_flash.write_model(model), folder)


def _write_native(
    model: LanguageModel, config: FormatConfig, special: SpecialTokens, folder: Path
) -> None:
    from slm.hub.native import to_transformers

    theirs = to_transformers(model, special, config.context_tokens)
    theirs.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)


WRITERS: dict[Format, Callable[[LanguageModel, FormatConfig, SpecialTokens, Path], None]] = {
    "slm": _write_slm,
    "nemotron_flash": _write_nemotron_flash,
    "native": _write_native,
}
