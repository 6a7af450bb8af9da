"""Models of others, and exports, written in another format.

    python -m slm.hub.convert path=Nemotron-Flash-1B out=models/nemotron_flash_1b

`path` is a folder in NVIDIA's layout of Nemotron-Flash, such as the released weights, or an export.
What comes out is checked as an export is, see `slm.hub.export`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from slm.config import ConfigError, entry_point, read, schema
from slm.hub.card import CARD_FILE, RunFacts, model_card
from slm.hub.export import is_replaceable, replacing
from slm.hub.formats import FormatConfig, write_model
from slm.hub.loading import CONFIG_FILE, load_folder, read_folder_config
from slm.hub.verify import verify

# What tokenizers of transformers consist of.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@schema
class ConvertConfig(FormatConfig):
    """What to convert, and where to.

    path: folder with config.json and model.safetensors. out: the folder to write.
    license: of the weights, which is that of those converted.
    """

    path: Path
    out: Path
    license: str

    def __post_init__(self) -> None:
        problems = []
        if not (self.path / CONFIG_FILE).is_file():
            problems.append(f"path: '{self.path}': there is no {CONFIG_FILE}")
        if not is_replaceable(self.out):
            problems.append(f"out: '{self.out}' exists and is not an export")
        if self.out.resolve() == self.path.resolve():
            problems.append(f"out: must be another folder than path, got '{self.out}'")
        if problems:
            raise ConfigError(problems)


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the model, and its tokenizer if there is one; what the check found.

    Raises ConfigError if the model cannot be read or written, and RuntimeError, leaving an earlier
    one as it was, if the new one fails its check.
    """
    model, _ = load_folder(config.path)
    end_of_text = read_folder_config(config.path).get("eos_token_id")
    with replacing(config.out) as folder:
        for name in TOKENIZER_FILES:
            if (config.path / name).is_file():
                shutil.copyfile(config.path / name, folder / name)
        write_model(model, config, end_of_text if isinstance(end_of_text, int) else 0, folder)
        card = model_card(
            model.architecture,
            RunFacts.read(config.path, model.architecture),
            name=config.out.resolve().name,
            path=str(config.out),
            prompt=config.prompt,
            license=config.license,
            format=config.format,
            origin="converted by",
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        verification = verify(model, folder, config)
    report = {"path": str(config.out), **asdict(verification)}
    print(json.dumps(report, indent=2))
    return report


def _check(config: DictConfig) -> ConvertConfig:
    return read(ConvertConfig, config)


@entry_point("convert", _check)
def main(config: DictConfig) -> dict[str, Any]:
    """Convert."""
    return convert(_check(config))


if __name__ == "__main__":
    main()
