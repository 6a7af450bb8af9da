"""Export of a checkpoint as a folder that others load, transformers first of all.

    python -m slm.hub.export checkpoint=runs/train push_to=user/name

The folder holds config, weights, tokenizer, model card, and, in the format 'slm', the model's code
as flat modules made from this package. Before it is put in place it is loaded, in a clean process
where transformers can, and compared with the trained model; what that found lies beside the folder,
in `<folder>.json`.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from slm.architecture import Architecture
from slm.config import ConfigError, entry_point, read, schema
from slm.evaluation_results import EVALUATION_FILE, known_results
from slm.hub.card import CARD_FILE, FACT_FILES, RunFacts, model_card
from slm.hub.flatten import flatten
from slm.hub.formats import (
    ENTRIES,
    FormatConfig,
    LicenseName,
    is_plugin,
    special_tokens,
    write_model,
    write_tokenizer,
)
from slm.hub.push import is_repository
from slm.hub.replacing import (
    file_sizes,
    read_report,
    replacement_problems,
    replacing,
    write_report,
)
from slm.hub.verify import in_one_line, verify
from slm.hub.weights import weights_files
from slm.operators import OPERATORS
from slm.training.checkpoint import LAST_CHECKPOINT, checkpoint_file, load_checkpoint

# Fields of the config that decide what an export holds.
DECISIVE = ("format", "dtype", "context_tokens", "prompt", "new_tokens", "license", "push_to")


@schema
class ExportConfig(FormatConfig):
    """What to export, and where to.

    checkpoint: a `.ckpt` file, or a run's folder.
    out: the folder to write; None: `export` in the run's folder, or `export_<format>`.
    chat_template: a Jinja file that makes a text of a conversation, for models tuned to chat.
    license: of the weights, as the Hub spells it.
    push_to: repository of the Hub, 'user/name'; None: no upload.
    private: make the repository private if it has to be made.
    dry_run: say what would be uploaded, and upload nothing.
    """

    checkpoint: Path
    out: Path | None = None
    chat_template: Path | None = None
    license: LicenseName = "apache-2.0"
    push_to: str | None = None
    private: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not self.checkpoint_file.exists():
            problems.append(f"checkpoint: '{self.checkpoint_file}': no such file")
        if self.chat_template is not None and not self.chat_template.is_file():
            problems.append(f"chat_template: '{self.chat_template}': no such file")
        if self.push_to is not None and not is_repository(self.push_to):
            problems.append(f"push_to: must be 'user/name', got {self.push_to!r}")
        lost = replacement_problems(self.folder, self.checkpoint_file)
        problems += [f"out: {problem}" for problem in lost]
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


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the export and check it, unless it is there already; its report.

    Raises ConfigError if the checkpoint cannot be read, and VerificationError, leaving an earlier
    export as it was, if the new one fails its check.
    """
    source = _source(config)
    report = read_report(config.folder)
    if report.get("source") == source and report["files"] == file_sizes(config.folder):
        print(f"{config.folder}: up to date")
        return report

    model, tokenizer_file = load_checkpoint(config.checkpoint)
    with replacing(config.folder) as folder:
        template = None
        if config.chat_template is not None:
            template = config.chat_template.read_text(encoding="utf-8")
        end_of_text = write_tokenizer(tokenizer_file, folder, template)
        write_model(model, config, special_tokens(end_of_text), folder)
        facts = _facts(config, model.architecture)
        evaluation = config.folder / EVALUATION_FILE
        if found := known_results(evaluation, weights_files(folder)):
            # Of an export with the same weights, which this one replaces.
            shutil.copyfile(evaluation, folder / EVALUATION_FILE)
            facts = replace(facts, evaluation=facts.evaluation | found)
        name = config.push_to or config.run_folder.resolve().name
        card = model_card(
            model.architecture,
            facts,
            name=name.rpartition("/")[2],
            path=config.push_to or str(config.folder),
            prompt=config.prompt,
            license=config.license,
            format=config.format,
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        verification = verify(model, folder, config)
    report = write_report(config.folder, asdict(verification) | {"source": source})
    print(f"{config.folder}: written and checked in {verification.seconds:.1f} s")
    print(f"largest difference of a logit: {verification.max_abs_logit_difference:.3g}")
    print(f"sample: {verification.sample}")
    return report


def _facts(config: ExportConfig, architecture: Architecture) -> RunFacts:
    """What the run's folder says of the weights that are exported."""
    facts = RunFacts.read(config.run_folder, architecture, [config.checkpoint_file])
    if config.checkpoint_file.name != LAST_CHECKPOINT.name:
        # Result and course are those of the run's last checkpoint.
        facts = replace(facts, result={}, curve=())
    # What was found of other weights is not said of rounded ones.
    return facts if config.dtype in (None, "float32") else replace(facts, evaluation={})


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
            name: _digest(config.run_folder / name)
            for name in FACT_FILES
            if (config.run_folder / name).is_file()
        },
        "config": {name: getattr(config, name) for name in DECISIVE},
        "chat_template": config.chat_template and _digest(config.chat_template),
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _check(config: DictConfig) -> ExportConfig:
    return read(ExportConfig, config)


@entry_point("export", _check)
def main(config: DictConfig) -> dict[str, Any]:
    """Export, check, and upload if asked to."""
    from slm.hub.push import contents, push

    settings = _check(config)
    with in_one_line():
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
