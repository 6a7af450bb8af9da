"""Word cloze: which of four words stood in a held-out sentence?

A proxy accuracy that tells small models apart within a minute of training, where benchmarks such
as BLiMP or ARC still show chance. The wrong words are as frequent in the training text as the right
one, so that knowing frequencies does not help.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from slm.data.choices import NUM_CHOICES, WORD, hide, sentences, texts
from slm.data.packing import PackedCorpus
from slm.data.tokenizer import load_tokenizer

# Wrong words occur at most this many times more, or less, often than the right one.
FREQUENCY_RATIO = 1.5
# Words rarer than this in the training text have no frequency to speak of.
MIN_COUNT = 5
MIN_LETTERS = 3


@dataclass(frozen=True)
class ClozeItem:
    """One sentence with four different words in one place.

    answer: index of the sentence as it was written. document: number of the document it is from.
    """

    sentences: tuple[str, ...]
    answer: int
    document: int


def build_cloze(corpus: PackedCorpus, num_items: int, seed: int) -> list[ClozeItem]:
    """Make at most `num_items` items from the validation split; a small split has fewer sentences.

    Only lower-case words are asked for, and no sentence that was read in the training text too.
    The same arguments give the same items.
    """
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    counts: Counter[str] = Counter()
    known: set[int] = set()
    for document in texts(corpus.train, tokenizer):
        counts.update(word for word in WORD.findall(document) if _is_eligible(word))
        known.update(hash(sentence) for _, sentence in sentences(document))
    # Each sentence, with the number of the document that it first occurs in.
    documents: dict[str, int] = {}
    for number, document in enumerate(texts(corpus.validation, tokenizer)):
        for _, sentence in sentences(document):
            documents.setdefault(sentence, number)
    rng = random.Random(seed)
    candidates = [sentence for sentence in documents if hash(sentence) not in known]
    rng.shuffle(candidates)
    distractors = Distractors(counts)
    items = (
        item
        for sentence in candidates
        for item in _item(sentence, documents[sentence], distractors, rng)
    )
    return list(islice(items, num_items))


class Distractors:
    """Words by their frequency."""

    def __init__(self, counts: Counter[str]) -> None:
        # Equal counts in alphabetical order: the order of counting decides nothing.
        pairs = sorted((count, word) for word, count in counts.items() if count >= MIN_COUNT)
        self.counts = np.array([count for count, _ in pairs])
        self.words = [word for _, word in pairs]
        self.count_of = {word: count for count, word in pairs}

    def sample(self, word: str, rng: random.Random) -> list[str]:
        """Other words of like frequency; fewer than NUM_CHOICES - 1 if there are no more."""
        count = self.count_of.get(word)
        if count is None:
            return []
        bounds = [count / FREQUENCY_RATIO, count * FREQUENCY_RATIO]
        low = int(np.searchsorted(self.counts, bounds[0], side="left"))
        high = int(np.searchsorted(self.counts, bounds[1], side="right"))
        # One more than needed, as the word itself is among them.
        drawn = rng.sample(range(low, high), min(NUM_CHOICES, high - low))
        others = [self.words[index] for index in drawn if self.words[index] != word]
        return others[: NUM_CHOICES - 1]


def _item(
    sentence: str, document: int, distractors: Distractors, rng: random.Random
) -> Iterator[ClozeItem]:
    """Yield an item for one word of the sentence, if any has enough distractors."""
    places = [place for place in WORD.finditer(sentence) if _is_eligible(place[0])]
    rng.shuffle(places)
    for place in places:
        others = distractors.sample(place[0], rng)
        if len(others) < NUM_CHOICES - 1:
            continue
        words, answer = hide(place[0], others, rng)
        start, end = place.span()
        choices = tuple(sentence[:start] + word + sentence[end:] for word in words)
        yield ClozeItem(choices, answer, document)
        return


def _is_eligible(word: str) -> bool:
    return word.islower() and len(word) >= MIN_LETTERS
