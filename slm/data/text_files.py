"""Documents streamed by `datasets`: a person's own files, and FineWeb-Edu from the Hub."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slm.config import ConfigError

BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".parquet": "parquet"}
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SUBSET = "sample-10BT"

DOCUMENT_END = "<|endoftext|>"
# A plain text is cut at the first blank line after this many characters, at any line after four
# times as many: so that a book has parts to hold out, and no document fills the memory.
CUT_CHARACTERS = 16_384
# How much of a file is looked at to tell text from other bytes.
SNIFFED_BYTES = 65_536


def read_files(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the documents of each file. Raises ConfigError naming a file that cannot be read."""
    for path in paths:
        builder = BUILDERS[path.suffix]
        _refuse_unreadable(path)
        options = {"keep_linebreaks": True} if builder == "text" else {}
        rows = stream(builder, f"data.files: '{path}'", data_files=[str(path)], **options)
        yield from cut(rows) if builder == "text" else rows


def read_fineweb_edu() -> Iterator[str]:
    """Yield the documents of FineWeb-Edu's 10-billion-token sample."""
    yield from stream(FINEWEB_EDU, f"data.source: {FINEWEB_EDU}", name=FINEWEB_EDU_SUBSET)


def stream(dataset: str, where: str, **options: Any) -> Iterator[str]:
    """Yield the field `text` of each row of a dataset, without downloading or keeping it whole.

    where: how an error names the data. Raises ConfigError if they cannot be read.
    """
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split="train", streaming=True, **options)
        for row in rows:
            text = row.get("text")
            if not isinstance(text, str):
                raise ValueError(f"a row without a string in the field 'text', but {sorted(row)}")
            yield text
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError([f"{where} cannot be read: {_reason(error)}"]) from error


def cut(lines: Iterable[str]) -> Iterator[str]:
    """Group lines into documents, at lines `<|endoftext|>` and where a text grows long."""
    document: list[str] = []
    size = 0
    for line in lines:
        is_end = line.strip() == DOCUMENT_END
        if not is_end:
            document.append(line)
            size += len(line)
        is_long = (size >= CUT_CHARACTERS and not line.strip()) or size >= 4 * CUT_CHARACTERS
        if is_end or is_long:
            yield "".join(document)
            document, size = [], 0
    yield "".join(document)


def _refuse_unreadable(path: Path) -> None:
    """Raise ConfigError naming a file that is empty, or binary against its ending."""
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    if not start.strip():
        raise ConfigError([f"data.files: '{path}' is empty"])
    if b"\0" in start and BUILDERS[path.suffix] != "parquet":
        raise ConfigError([f"data.files: '{path}' holds binary data, not text"])


def _reason(error: Exception) -> str:
    """The innermost cause, on one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())
