"""Documents streamed by `datasets`: a person's own files, and data sets of the Hub."""

import codecs
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm.config import ConfigError
from slm.data.reader import Part

if TYPE_CHECKING:
    import datasets

BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".parquet": "parquet"}

DOCUMENT_END = "<|endoftext|>"
# A plain text is cut at the first blank line after this many characters, at any line after four
# times as many: so that a book has parts to hold out, and no document fills the memory.
CUT_CHARACTERS = 16_384
# How much of a file is looked at to tell text from other bytes.
SNIFFED_BYTES = 65_536
# Read at a time.
CHUNK_BYTES = 2**20
BATCH_ROWS = 1000


def file_parts(paths: Sequence[Path]) -> list[Part]:
    """One part per file. Raises ConfigError naming all files that cannot be read as text.

    All of every file is looked at before the first is read: a file that ends a build after hours
    would be changed, and a changed file makes another corpus.
    """
    problems = [problem for path in paths for problem in _file_problems(path)]
    if problems:
        raise ConfigError(problems)
    return [functools.partial(_read_file, path) for path in paths]


def hub_parts(repository: str, subset: str | None, revision: str | None) -> list[Part]:
    """One part per file of a data set's split `train`. Raises ConfigError if it cannot be had."""
    where = f"data.repository: '{repository}'"
    dataset = _open(where, repository, name=subset, revision=revision)

    def read(index: int) -> Iterator[str]:
        return _texts(dataset.shard(num_shards=dataset.num_shards, index=index), where)

    return [functools.partial(read, index) for index in range(dataset.num_shards)]


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


def _read_file(path: Path) -> Iterator[str]:
    builder = BUILDERS[path.suffix]
    where = f"data.files: '{path}'"
    options = {"keep_linebreaks": True} if builder == "text" else {}
    texts = _texts(_open(where, builder, data_files=[str(path)], **options), where)
    return cut(texts) if builder == "text" else texts


def _open(where: str, dataset: str, **options: Any) -> "datasets.IterableDataset":
    """A data set that is neither downloaded nor kept whole."""
    import datasets

    try:
        return datasets.load_dataset(dataset, split="train", streaming=True, **options)
    except _errors() as error:
        raise _unreadable(where, error) from error


def _texts(dataset: "datasets.IterableDataset", where: str) -> Iterator[str]:
    """Yield the field `text` of each row. Raises ConfigError, naming the data as `where`."""
    # Columns at a time: five times as fast as rows.
    batches = dataset.with_format("arrow").iter(batch_size=BATCH_ROWS)
    row = 0
    try:
        for batch in batches:
            names = batch.column_names
            texts = batch.column("text").to_pylist() if "text" in names else [None]
            for text in texts:
                row += 1
                if not isinstance(text, str):
                    raise ValueError(
                        f"row {row} has no string in the field 'text': {sorted(names)}"
                    )
                yield text
    except _errors() as error:
        raise _unreadable(where, error) from error


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` raises on data that it cannot get, or not read."""
    import datasets

    return (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError)


def _unreadable(where: str, error: Exception) -> ConfigError:
    """Names the innermost cause, on one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError([f"{where} cannot be read: {reason}"])


def _file_problems(path: Path) -> list[str]:
    """What is wrong with a file: it is empty, binary against its ending, or not UTF-8."""
    with path.open("rb") as file:
        start = file.read(SNIFFED_BYTES)
    if not start.strip() and len(start) < SNIFFED_BYTES:
        return [f"data.files: '{path}' is empty"]
    if BUILDERS[path.suffix] == "parquet":
        return []
    if b"\0" in start:
        return [f"data.files: '{path}' holds binary data, not text"]
    return _utf8_problems(path)


def _utf8_problems(path: Path) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            # Bytes of a character that the chunk before ended in.
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                found = error.object[error.start]
                return [
                    f"data.files: '{path}' is not UTF-8: byte {place:,} is 0x{found:02x} "
                    f"({error.reason}); convert it, for example with iconv"
                ]
            if not chunk:
                return []
            offset += len(chunk)
