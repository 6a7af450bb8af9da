"""Export of a checkpoint as a folder that others load, transformers first of all.

    python -m slm.hub.export checkpoint=runs/train push_to=user/name

The folder holds config, weights, tokenizer, model card, and, in the format 'slm', the model's code
as flat modules made from this package. Before it is put in place it is loaded, in a clean process
where transformers can, and compared with the trained model; what that found lies beside the folder,
in `<folder>.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from slm.config import ConfigError, entry_point, read, schema
from slm.hub.card import CARD_FILE, FACT_FILES, RunFacts, is_card, model_card, read_json
from slm.hub.flatten import flatten
from slm.hub.formats import ENTRIES, FormatConfig, is_plugin, write_model, write_tokenizer
from slm.hub.verify import verify
from slm.operators import OPERATORS
from slm.training.checkpoint import checkpoint_file, load_checkpoint
from slm.training.files import write_atomically

# Fields of the config that decide what an export holds.
DECISIVE = ("format", "dtype", "context_tokens", "prompt", "new_tokens", "license", "push_to")


@schema
class ExportConfig(FormatConfig):
    """What to export, and where to.

    checkpoint: a `.ckpt` file, or a run's folder.
    out: the folder to write; None: `export` in the run's folder, or `export_<format>`.
    license: of the weights, as the Hub spells it.
    push_to: repository of the Hub, 'user/name'; None: no upload.
    private: make the repository private if it has to be made.
    dry_run: say what would be uploaded, and upload nothing.
    """

    checkpoint: Path
    out: Path | None = None
    license: str = "apache-2.0"
    push_to: str | None = None
    private: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint_file.exists():
            problems.append(f"checkpoint: '{self.checkpoint_file}': no such file")
        if self.push_to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to):
            problems.append(f"push_to: must be 'user/name', got {self.push_to!r}")
        if not is_replaceable(self.folder):
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
        default = "export" if self.format == "slm" else f"export_{self.format}"
        return self.run_folder / default if self.out is None else self.out

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
    report = read_json(config.report_file)
    if report.get("source") == source and report.get("files") == _sizes(config.folder):
        print(f"{config.folder}: up to date")
        return report

    model, tokenizer_file = load_checkpoint(config.checkpoint)
    with replacing(config.folder) as folder:
        write_model(model, config, write_tokenizer(tokenizer_file, folder), folder)
        name = config.push_to or config.run_folder.resolve().name
        card = model_card(
            model.architecture,
            RunFacts.read(config.run_folder, model.architecture),
            name=name.rpartition("/")[2],
            path=config.push_to or str(config.folder),
            prompt=config.prompt,
            license=config.license,
            format=config.format,
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        verification = verify(model, folder, config)
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


def is_replaceable(folder: Path) -> bool:
    """Whether nothing is lost if an export takes the place of `folder`."""
    return not folder.exists() or is_card(folder / CARD_FILE)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
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
    for name in filter(is_plugin, sorted({cls.__module__ for cls in OPERATORS.values()})):
        code.update(Path(str(sys.modules[name].__file__)).read_bytes())
    return {
        "checkpoint": str(config.checkpoint_file.resolve()),
        "size": state.st_size,
        "modified_ns": state.st_mtime_ns,
        "code": code.hexdigest()[:12],
        "facts": {
            name: hashlib.sha256((config.run_folder / name).read_bytes()).hexdigest()[:12]
            for name in FACT_FILES
            if (config.run_folder / name).is_file()
        },
        "config": {name: getattr(config, name) for name in DECISIVE},
    }


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def _check(config: DictConfig) -> ExportConfig:
    return read(ExportConfig, config)


@entry_point("export", _check)
def main(config: DictConfig) -> dict[str, Any]:
    """Export, check, and upload if asked to."""
    from slm.hub.push import contents, push

    settings = _check(config)
    report = export(settings)
    if settings.dry_run:
        files = contents(settings.folder)
        for name, size in files.items():
            print(f"{size:>15,}  {name}")
        target = settings.push_to or "nowhere: push_to= is not given"
        print(f"{sum(files.values()):>15,}  bytes would go to {target}")
    elif settings.push_to is not None:
        print(f"uploaded: {push(settings.folder, settings.push_to, settings.private)}")
    return report


if __name__ == "__main__":
    main()
