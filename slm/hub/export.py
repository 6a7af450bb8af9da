"""Export of a checkpoint as a folder that transformers loads anywhere.

    python -m slm.hub.export checkpoint=runs/train push_to=user/name

The folder holds config, weights, tokenizer, model card, and the model's code as flat modules made
from this package. Before it is put in place, a clean process loads it and compares it with the
trained model; what it found lies beside the folder, in `<folder>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import Field

from slm.config import ConfigError, entry_point, read, schema
from slm.data.tokenizer import end_of_text_id, load_tokenizer
from slm.hub.card import model_card
from slm.hub.flatten import flatten
from slm.hub.loading import CONFIG_FILE
from slm.hub.verify import verify
from slm.model import LanguageModel
from slm.operators import OPERATORS
from slm.runtime import PluginsConfig
from slm.training.checkpoint import TOKENIZER_FILE, checkpoint_file, load_checkpoint
from slm.training.files import write_atomically

ENTRIES = ("slm.hub.configuration", "slm.hub.modeling")
AUTO_MAP = {
    "AutoConfig": "slm_hub_configuration.SLMConfig",
    "AutoModelForCausalLM": "slm_hub_modeling.SLMForCausalLM",
}


@schema
class ExportConfig(PluginsConfig):
    """What to export, and where to.

    checkpoint: a `.ckpt` file, or a run's folder.
    out: the folder to write; None: `export` in the run's folder.
    prompt, new_tokens: of the sample that the self-check generates.
    license: of the weights, as the Hub spells it.
    push_to: repository of the Hub, 'user/name'; None: no upload.
    private: make the repository private if it has to be made.
    """

    checkpoint: Path
    out: Path | None = None
    prompt: str = "The "
    new_tokens: Annotated[int, Field(gt=0)] = 64
    license: str = "apache-2.0"
    push_to: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint_file.is_file():
            problems.append(f"checkpoint: '{self.checkpoint_file}': no such file")
        if self.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            problems.append(f"push_to: must be 'user/name', got {self.push_to!r}")
        if self.folder.exists() and not _is_export(self.folder):
            problems.append(f"out: '{self.folder}' exists and is not an export")
        if problems:
            raise ConfigError(problems)

    @property
    def checkpoint_file(self) -> Path:
        """The checkpoint's file."""
        return checkpoint_file(self.checkpoint)

    @property
    def run_folder(self) -> Path:
        """The folder of the run that the checkpoint belongs to."""
        return self.checkpoint_file.parent.parent

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.run_folder / "export" if self.out is None else self.out

    @property
    def report_file(self) -> Path:
        """What the self-check found, and what the export was made from."""
        return self.folder.with_name(f"{self.folder.name}.json")


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the export and check it, unless it is there already; its report.

    Raises ConfigError if the checkpoint cannot be read, and RuntimeError, leaving an earlier export
    as it was, if the new one fails its check.
    """
    source = _source(config)
    report = _read_json(config.report_file)
    if report.get("source") == source and report.get("files") == _sizes(config.folder):
        print(f"{config.folder}: up to date")
        return report

    model, tokenizer_file = load_checkpoint(config.checkpoint)
    with _replacing(config.folder) as folder:
        write_model(model, write_tokenizer(tokenizer_file, folder), folder)
        result = _read_json(config.run_folder / "result.json")
        name = config.push_to or config.run_folder.resolve().name
        card = model_card(
            model.architecture,
            result,
            name=name.rpartition("/")[2],
            path=config.push_to or str(config.folder),
            prompt=config.prompt,
            license=config.license,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        verification = verify(model, folder, config.prompt, config.new_tokens)
    report = {
        "path": str(config.folder),
        **asdict(verification),
        "source": source,
        "files": _sizes(config.folder),
    }
    write_atomically(config.report_file, json.dumps(report, indent=2) + "\n")
    print(f"{config.folder}: written and checked in {verification.seconds:.1f} s")
    print(f"largest difference of a logit: {verification.max_abs_logit_difference:.3g}")
    print(f"sample: {verification.sample}")
    return report


def write_model(model: LanguageModel, end_of_text: int, folder: Path) -> None:
    """Write config, generation config, weights, and the code that makes a model of them."""
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from slm.hub.configuration import SLMConfig
    from slm.hub.modeling import SLMForCausalLM

    disable_progress_bar()
    special: dict[str, Any] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text
    )
    config = SLMConfig(str(model.architecture), auto_map=AUTO_MAP, **special)
    # Built without storage: the weights are those of `model`.
    with torch.device("meta"):
        shell = SLMForCausalLM(config)
    shell.model = model
    shell.generation_config = GenerationConfig(**special)
    shell.save_pretrained(folder)
    used = {OPERATORS[operator.name].__module__ for operator in model.architecture.operators}
    for name, text in flatten(ENTRIES, sorted(filter(_is_plugin, used))).items():
        (folder / name).write_text(text, encoding="utf-8")


def write_tokenizer(tokenizer_file: Path, folder: Path) -> int:
    """Write the tokenizer as transformers wants it; the id of its end of text."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = load_tokenizer(tokenizer_file)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    end_of_text = end_of_text_id(tokenizer)
    token = tokenizer.id_to_token(end_of_text)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token,
        eos_token=token,
        pad_token=token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    # As it was trained with, untouched by the wrapper.
    shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    return end_of_text


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` if nothing is raised."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)


def _source(config: ExportConfig) -> dict[str, Any]:
    """All that decides what the export holds."""
    state = config.checkpoint_file.stat()
    code = hashlib.sha256()
    for name, text in flatten(ENTRIES).items():
        code.update(f"{name}\n{text}".encode())
    for name in filter(_is_plugin, sorted({cls.__module__ for cls in OPERATORS.values()})):
        code.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return {
        "checkpoint": str(config.checkpoint_file.resolve()),
        "size": state.st_size,
        "modified_ns": state.st_mtime_ns,
        "code": code.hexdigest()[:12],
        "result": _read_json(config.run_folder / "result.json"),
        "prompt": config.prompt,
        "new_tokens": config.new_tokens,
        "license": config.license,
        "push_to": config.push_to,
    }


def _is_plugin(module: str) -> bool:
    """Whether an operator's module lies outside this package."""
    return module.partition(".")[0] != __package__.partition(".")[0]


def _is_export(folder: Path) -> bool:
    return _read_json(folder / CONFIG_FILE).get("auto_map") == AUTO_MAP


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check(config: DictConfig) -> ExportConfig:
    return read(ExportConfig, config)


@entry_point("export", _check)
def main(config: DictConfig) -> dict[str, Any]:
    """Export, check, and upload if asked to."""
    from slm.hub.push import push

    settings = _check(config)
    report = export(settings)
    if settings.push_to is not None:
        print(f"uploaded: {push(settings.folder, settings.push_to, settings.private)}")
    return report


if __name__ == "__main__":
    main()
