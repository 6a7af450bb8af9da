"""Readers: the documents of a source one after another, from any place where they were left.

A reader is an iterator with a state, JSON-able, from which another reader goes on: a stream of many
gigabytes that was cut off is not read again from its beginning.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from slm.config import ConfigError

logger = logging.getLogger(__name__)

# What can be opened by itself: a file, a chapter of a book. Its documents have a fixed order.
Part = Callable[[], Iterator[str]]


class Reader(Protocol):
    """An iterator over documents; `state()` says where it is, None being the beginning."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def state(self) -> Any:
        """Where the next document is."""


class PartsReader:
    """The documents of all parts that have text.

    parts: found when the first document is asked for. Its state is [part, documents of it read]: a
    part that was left in its middle is read again up to there, those before it are not opened.
    """

    def __init__(self, parts: Callable[[], Sequence[Part]], state: Any = None) -> None:
        self._find_parts = parts
        self._part: int
        self._documents: int
        self._part, self._documents = state or (0, 0)
        self._rest = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._rest)

    def state(self) -> Any:
        """[part, documents of it read]."""
        return [self._part, self._documents]

    def _read(self) -> Iterator[str]:
        parts = self._find_parts()
        while self._part < len(parts):
            for document in islice(parts[self._part](), self._documents, None):
                self._documents += 1
                if document.strip():
                    yield document
            self._part, self._documents = self._part + 1, 0


class LimitedReader:
    """The documents of another reader, up to a number of them and of bytes in UTF-8.

    open_reader: the other, from a state on.
    """

    def __init__(
        self,
        open_reader: Callable[[Any], Reader],
        max_documents: int | None,
        max_bytes: int | None,
        state: Any = None,
    ) -> None:
        self._num_documents: int
        self._num_bytes: int
        self._num_documents, self._num_bytes, inner = state or (0, 0, None)
        self._reader = open_reader(inner)
        self._max_documents = max_documents
        self._max_bytes = max_bytes

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._num_documents == self._max_documents:
            raise StopIteration
        document = next(self._reader)
        self._num_documents += 1
        self._num_bytes += num_bytes(document)
        if self._max_bytes is not None and self._num_bytes > self._max_bytes:
            raise StopIteration
        return document

    def state(self) -> Any:
        """[documents, bytes, the other reader's state]."""
        return [self._num_documents, self._num_bytes, self._reader.state()]


@dataclass(frozen=True)
class Component:
    """Part of a mixture.

    open_reader: reads it from a state on. weight: its share of the mixture's bytes, relative to the
    others'. epochs: how often it may be read.
    """

    open_reader: Callable[[Any], Reader]
    weight: float
    epochs: int


class MixtureReader:
    """Documents of several components, always of the one that is furthest behind its share.

    So shares hold within a document's size wherever reading ends: at the latest where a component
    has no more to give, since the others would change the shares.
    """

    def __init__(self, components: Mapping[str, Component], state: Any = None) -> None:
        self._components = components
        # Of each component: the epoch, the bytes read in all epochs, and the reader's state.
        state = state or {name: [0, 0, None] for name in components}
        self._epochs = {name: state[name][0] for name in components}
        self._num_bytes = {name: state[name][1] for name in components}
        self._readers = {
            name: part.open_reader(state[name][2]) for name, part in components.items()
        }

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        name = min(
            self._components, key=lambda name: self._num_bytes[name] / self._components[name].weight
        )
        document = self._next_of(name)
        self._num_bytes[name] += num_bytes(document)
        return document

    def state(self) -> Any:
        """{component: [epoch, bytes in all epochs, its reader's state]}."""
        return {
            name: [self._epochs[name], self._num_bytes[name], self._readers[name].state()]
            for name in self._components
        }

    def _next_of(self, name: str) -> str:
        component = self._components[name]
        document = next(self._readers[name], None)
        if document is None and not self._num_bytes[name]:
            raise ConfigError([f"data.components.{name}: there is no text in it"])
        if document is None and self._epochs[name] + 1 < component.epochs:
            self._epochs[name] += 1
            self._readers[name] = component.open_reader(None)
            document = next(self._readers[name], None)
        if document is None:
            logger.warning(
                "data.components.%s: ends after %.1f MB, and the mixture with it; epochs=%d reads "
                "it once more",
                name,
                self._num_bytes[name] / 1e6,
                component.epochs + 1,
            )
            raise StopIteration
        return document


def num_bytes(document: str) -> int:
    """Bytes of a document in UTF-8."""
    return len(to_bytes(document))


def to_bytes(document: str) -> bytes:
    """A document in UTF-8. Text out of JSON may hold lone surrogates, which no UTF-8 can: `?`."""
    return document.encode("utf-8", errors="replace")
