"""Models of others, and exports, written in another format.

    python -m slm.hub.convert path=Nemotron-Flash-1B out=models/nemotron_flash_1b license=other

`path` is a folder in NVIDIA's layout of Nemotron-Flash, such as the released weights, or an export.
What comes out is checked as an export is, see `slm.hub.export`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from slm.config import ConfigError, entry_point, read, schema
from slm.hub import nemotron_flash
from slm.hub.card import CARD_FILE, RunFacts, model_card
from slm.hub.formats import (
    SPECIAL_TOKENS,
    FormatConfig,
    LicenseName,
    SpecialTokens,
    write_model,
)
from slm.hub.loading import CONFIG_FILE, load_folder, read_folder_config
from slm.hub.replacing import replacement_problems, replacing, write_report
from slm.hub.verify import in_one_line, verify
from slm.hub.weights import weights_files

# What tokenizers of transformers consist of: what is taken over as it is, and what is read.
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@schema
class ConvertConfig(FormatConfig):
    """What to convert, and where to.

    path: folder with config.json and model.safetensors. out: the folder to write.
    license: of the weights, which is that of those converted.
    """

    path: Path
    out: Path
    license: LicenseName

    def __post_init__(self) -> None:
        problems = []
        if not (self.path / CONFIG_FILE).is_file():
            problems.append(f"path: '{self.path}': there is no {CONFIG_FILE}")
        lost = replacement_problems(self.out, self.path)
        problems += [f"out: {problem}" for problem in lost]
        if problems:
            raise ConfigError(problems)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the model, and its tokenizer if there is one; what the check found.

    Raises ConfigError if the model cannot be read or written, and VerificationError, leaving an
    earlier one as it was, if the new one fails its check.
    """
    model, _ = load_folder(config.path)
    facts = RunFacts.read(config.path, model.architecture, weights_files(config.path))
    if config.dtype is not None:
        # What was found of other weights is not said of rounded ones.
        facts = replace(facts, evaluation={})
    with replacing(config.out) as folder:
        _copy_tokenizer(config.path, folder)
        write_model(model, config, _special_tokens(config.path), folder)
        card = model_card(
            model.architecture,
            facts,
            name=config.out.resolve().name,
            path=str(config.out),
            prompt=config.prompt,
            license=config.license,
            format=config.format,
            origin="converted by",
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        verification = verify(model, folder, config)
    report = write_report(config.out, asdict(verification))
    print(json.dumps(report, indent=2))
    return report


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Take over a tokenizer, but no code: neither what lies beside it nor where some is said to be.

    transformers would run it when it loads what is written, here and wherever else.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in TOKENIZER_CONFIGS:
        if (source / name).is_file():
            content = read_folder_config(source, name)
            content.pop("auto_map", None)
            if "tokenizer_class" in content:
                # All that a tokenizer.json needs.
                content["tokenizer_class"] = "PreTrainedTokenizerFast"
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _special_tokens(folder: Path) -> SpecialTokens:
    """As a folder's config has them."""
    config = read_folder_config(folder)
    if nemotron_flash.is_layout(config):
        config = asdict(nemotron_flash.read_config(config))
    return {name: config.get(name) for name in SPECIAL_TOKENS}


def _check(config: DictConfig) -> ConvertConfig:
    return read(ConvertConfig, config)


@entry_point("convert", _check)
def main(config: DictConfig) -> dict[str, Any]:
    """Convert."""
    settings = _check(config)
    with in_one_line():
        return convert(settings)


if __name__ == "__main__":
    main()
