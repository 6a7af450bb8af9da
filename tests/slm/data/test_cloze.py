import re
from collections import Counter

import pytest

from slm.data import PackedCorpus
from slm.data.cloze import FREQUENCY_RATIO, ClozeItem, build_cloze
from slm.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def items(corpus: PackedCorpus) -> list[ClozeItem]:
    return build_cloze(corpus, 300, seed=0)


def text_of(split, corpus: PackedCorpus) -> str:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    documents = (split.document(index).tolist() for index in range(split.num_documents))
    return "\n\n".join(tokenizer.decode_batch(list(documents)))


def words_of(item: ClozeItem) -> list[str]:
    """The four words, found by taking away what the sentences share."""
    split = [re.findall(r"[\w'’]+|[^\w'’]+", sentence) for sentence in item.sentences]
    differing = [words for words in zip(*split, strict=True) if len(set(words)) > 1]
    (words,) = differing
    return list(words)


def test_true_sentences_are_held_out(items: list[ClozeItem], corpus: PackedCorpus) -> None:
    train, validation = text_of(corpus.train, corpus), text_of(corpus.validation, corpus)
    assert len({item.sentences[item.answer] for item in items}) == len(items) == 300
    for item in items:
        true = item.sentences[item.answer]
        assert true in validation
        assert f" {true} " not in train
        assert len(set(item.sentences)) == 4


def test_wrong_words_are_as_frequent_as_the_right_one(
    items: list[ClozeItem], corpus: PackedCorpus
) -> None:
    counts = Counter(re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text_of(corpus.train, corpus)))
    ranks = Counter()
    for item in items:
        words = words_of(item)
        right = counts[words[item.answer]]
        assert right >= 5
        for word in words:
            assert right / FREQUENCY_RATIO <= counts[word] <= right * FREQUENCY_RATIO
        ranks[sorted(words, key=lambda word: counts[word]).index(words[item.answer])] += 1
    # Choosing the most frequent word is no better than chance.
    assert max(ranks[0], ranks[3]) < 0.45 * len(items)


def test_answers_are_spread_evenly(items: list[ClozeItem]) -> None:
    answers = Counter(item.answer for item in items)
    assert set(answers) == {0, 1, 2, 3}
    assert min(answers.values()) > 45


def test_the_seed_decides(items: list[ClozeItem], corpus: PackedCorpus) -> None:
    assert build_cloze(corpus, 300, seed=0) == items
    assert build_cloze(corpus, 20, seed=0) == items[:20]
    assert build_cloze(corpus, 300, seed=1) != items


def test_a_small_split_has_fewer_items(corpus: PackedCorpus) -> None:
    assert 300 < len(build_cloze(corpus, 10**6, seed=0)) < 10**4
