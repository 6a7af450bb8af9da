"""Continuation choice: which of four stretches of text goes on from a held-out context?

A proxy accuracy beside the word cloze: that one asks for grammar and meaning within a sentence,
this one for what carries over from sentence to sentence. Every continuation begins with a sentence
and has the same number of tokens, and the wrong ones are right in other items: to know which
stretches are likely by themselves does not help.
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from slm.data.choices import NUM_CHOICES, hide, sentences, texts
from slm.data.packing import PackedCorpus
from slm.data.tokenizer import load_tokenizer

# A context is as many whole sentences as there is room for.
MAX_CONTEXT_TOKENS = 96
# A longer continuation tells models apart less well: each further token says less about the context
# and adds its own chance.
CONTINUATION_TOKENS = 16


@dataclass(frozen=True)
class ContinuationItem:
    """The beginning of some document's passage, and four different ways to go on.

    context: token ids, the end of text first. continuations: CONTINUATION_TOKENS ids each.
    answer: index of the continuation as it was written. document: number of the context's.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    answer: int
    document: int


def build_continuations(corpus: PackedCorpus, num_items: int, seed: int) -> list[ContinuationItem]:
    """Make at most `num_items` items from the validation split; a small split has fewer sentences.

    A continuation is right in one item only, and begins with no sentence that was read in the
    training text too; contexts may overlap. Wrong ones are taken from other documents, or from
    elsewhere in the same one where the others have too few. The same arguments give the same items.
    """
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    known = {
        hash(sentence)
        for document in texts(corpus.train, tokenizer)
        for _, sentence in sentences(document)
    }
    passages = Passages()
    for document in texts(corpus.validation, tokenizer):
        passages.add(*_read(document, tokenizer, known))
    rng = random.Random(seed)
    order = rng.sample(range(len(passages)), len(passages))
    items = (item for index in order for item in passages.item(index, rng))
    return list(islice(items, num_items))


class Passage(NamedTuple):
    """Where a context and its continuation begin.

    document: its number. context, continuation: index of the first token.
    """

    document: int
    context: int
    continuation: int


class Passages:
    """Passages in the order of the text; no two have the same continuation."""

    def __init__(self) -> None:
        self._documents: list[np.ndarray] = []
        self._passages: list[Passage] = []
        self._continuations: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._passages)

    def add(self, tokens: np.ndarray, starts: Sequence[int]) -> None:
        """Add the passages of a document.

        tokens: its ids, the end of text first. starts: where its sentences begin.
        """
        document = len(self._documents)
        self._documents.append(tokens)
        for index, start in enumerate(starts):
            first = bisect_left(starts, start - MAX_CONTEXT_TOKENS)
            passage = Passage(document, starts[first], start)
            continuation = self._continuation(passage).tobytes()
            is_whole = start + CONTINUATION_TOKENS <= len(tokens)
            if first < index and is_whole and continuation not in self._continuations:
                self._continuations.add(continuation)
                self._passages.append(passage)

    def item(self, index: int, rng: random.Random) -> Iterator[ContinuationItem]:
        """Yield the item of a passage, if there are enough others to take continuations from."""
        unfit = self._unfit(index)
        num_fit = len(self) - len(unfit)
        if num_fit < NUM_CHOICES - 1:
            return
        drawn = rng.sample(range(num_fit), NUM_CHOICES - 1)
        others = [place if place < unfit.start else place + len(unfit) for place in drawn]
        choices, answer = hide(index, others, rng)
        continuations = [self._continuation(self._passages[place]) for place in choices]
        document, start, end = self._passages[index]
        tokens = self._documents[document]
        yield ContinuationItem(
            context=(int(tokens[0]), *tokens[start:end].tolist()),
            continuations=tuple(tuple(each.tolist()) for each in continuations),
            answer=answer,
            document=document,
        )

    def _unfit(self, index: int) -> range:
        """The passages whose continuations are not to be wrong ones for a passage."""
        document, context, continuation = self._passages[index]
        first = bisect_left(self._passages, (document,))
        last = bisect_left(self._passages, (document + 1,))
        if len(self) - (last - first) >= NUM_CHOICES - 1:
            return range(first, last)
        # Of the same document, what shares no token with the passage will do.
        low, high = context - CONTINUATION_TOKENS, continuation + CONTINUATION_TOKENS
        key = attrgetter("continuation")
        return range(
            bisect_right(self._passages, low, first, last, key=key),
            bisect_left(self._passages, high, first, last, key=key),
        )

    def _continuation(self, passage: Passage) -> np.ndarray:
        start = passage.continuation
        return self._documents[passage.document][start : start + CONTINUATION_TOKENS]


def _read(document: str, tokenizer: Tokenizer, known: set[int]) -> tuple[np.ndarray, list[int]]:
    """Token ids of a document, and where its sentences begin, those left out that are known."""
    encoding = tokenizer.encode(document)
    ends = [end for _, end in encoding.offsets]
    starts = []
    for place, sentence in sentences(document):
        start = bisect_right(ends, place)
        begin, _ = encoding.offsets[start]
        # A token may hold the space before a sentence, but nothing of the sentence before.
        if not document[begin:place].strip() and hash(sentence) not in known:
            starts.append(start)
    return np.array(encoding.ids, np.uint32), starts
