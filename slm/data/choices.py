"""What multiple-choice questions are made of: held-out documents, sentences, and where to hide."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tokenizers import Tokenizer

from slm.data.packing import PackedSplit

Choice = TypeVar("Choice")

NUM_CHOICES = 4
MIN_WORDS, MAX_WORDS = 5, 40
# Of a large split, tokens that are read: they bound memory and time.
MAX_TOKENS = 8_000_000
BATCH_DOCUMENTS = 256

PARAGRAPH_BREAK = re.compile(r"(\n\s*\n)")
SENTENCE = re.compile(r"[^.!?]+[.!?]")
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def texts(split: PackedSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield documents evenly spread over a split, about MAX_TOKENS of them altogether."""
    stride = max(1, -(-len(split) // MAX_TOKENS))
    chosen = range(0, split.num_documents, stride)
    for begin in range(0, len(chosen), BATCH_DOCUMENTS):
        documents: Iterable[int] = chosen[begin : begin + BATCH_DOCUMENTS]
        yield from tokenizer.decode_batch([split.document(index).tolist() for index in documents])


def sentences(document: str) -> Iterator[tuple[int, str]]:
    """Yield the place and text of each sentence of a document that has a fitting number of words.

    A sentence ends within its paragraph.
    """
    start = 0
    # The breaks are among the parts, so that their lengths add up.
    for part in PARAGRAPH_BREAK.split(document):
        for match in SENTENCE.finditer(part):
            sentence = match[0].strip()
            if MIN_WORDS <= len(WORD.findall(sentence)) <= MAX_WORDS:
                yield start + match.end() - len(match[0].lstrip()), sentence
        start += len(part)


def hide(true: Choice, others: Sequence[Choice], rng: random.Random) -> tuple[list[Choice], int]:
    """All choices with the true one in a random place among the others; that place."""
    answer = rng.randrange(len(others) + 1)
    return [*others[:answer], true, *others[answer:]], answer
