import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.cloze import build_cloze
from slm.data.continuation import (
    CONTINUATION_TOKENS,
    MAX_CONTEXT_TOKENS,
    ContinuationItem,
    build_continuations,
)
from slm.data.tokenizer import load_tokenizer
from slm.evaluation import continuation_accuracy

SENTENCES_PER_DOCUMENT = 60


@pytest.fixture(scope="module")
def items(corpus: PackedCorpus) -> list[ContinuationItem]:
    return build_continuations(corpus, 300, seed=0)


def generated_documents(num_documents: int) -> list[list[str]]:
    """Sentences that all begin differently, of words that are about as frequent."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(200)]
    pairs = list(itertools.permutations(words, 2))
    rng.shuffle(pairs)
    return [
        [" ".join([*pairs.pop(), *rng.sample(words, 4)]) for _ in range(SENTENCES_PER_DOCUMENT)]
        for _ in range(num_documents)
    ]


def pack(folder: Path, documents: list[str], validation_fraction: float) -> PackedCorpus:
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    config = DataConfig(
        source="text",
        files=(str(path),),
        validation_fraction=validation_fraction,
        cache_dir=folder / "cache",
    )
    return prepare(config, TokenizerConfig(vocab_size=280))


def documents_with(tokens: tuple[int, ...], corpus: PackedCorpus) -> set[int]:
    """Validation documents in which the tokens stand one after another."""
    split = corpus.validation
    wanted = np.array(tokens, split.token_dtype)
    found = set()
    for index in range(split.num_documents):
        document = split.document(index)
        if len(document) >= len(wanted):
            windows = np.lib.stride_tricks.sliding_window_view(document, len(wanted))
            if (windows == wanted).all(axis=1).any():
                found.add(index)
    return found


def test_true_continuations_go_on_from_the_context(
    items: list[ContinuationItem], corpus: PackedCorpus
) -> None:
    for item in items:
        assert len(item.continuations) == len(set(item.continuations)) == 4
        assert {len(each) for each in item.continuations} == {CONTINUATION_TOKENS}
        assert item.context[0] == corpus.end_of_text
        assert 1 < len(item.context) <= MAX_CONTEXT_TOKENS + 1
        passage = item.context[1:] + item.continuations[item.answer]
        assert item.document in documents_with(passage, corpus)


def test_wrong_continuations_are_from_other_documents(
    items: list[ContinuationItem], corpus: PackedCorpus
) -> None:
    for item in items[:100]:
        for index, continuation in enumerate(item.continuations):
            if index != item.answer:
                assert documents_with(continuation, corpus) - {item.document}


def test_continuations_begin_with_a_sentence_that_is_held_out(
    items: list[ContinuationItem], corpus: PackedCorpus
) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    train, validation = (
        tokenizer.decode_batch([split.document(n).tolist() for n in range(split.num_documents)])
        for split in (corpus.train, corpus.validation)
    )
    known = set(re.split(r"(?<=[.!?])\s+", "\n".join(train)))
    for item in items:
        context, true = (
            tokenizer.decode(list(each)) for each in (item.context, item.continuations[item.answer])
        )
        document = validation[item.document]
        place = document.index((context + true).rstrip("\ufffd")) + len(context)
        before = document[:place]
        assert before.endswith("\n\n") or before.rstrip()[-1] in ".!?"
        sentence = re.match(r"[^.!?]+[.!?]", document[place:])
        assert sentence is not None
        assert sentence[0].strip() not in known


def test_each_continuation_is_right_once(items: list[ContinuationItem]) -> None:
    assert len({item.continuations[item.answer] for item in items}) == len(items) == 300
    answers = Counter(item.answer for item in items)
    assert set(answers) == {0, 1, 2, 3}
    assert min(answers.values()) > 45


def test_the_seed_decides(items: list[ContinuationItem], corpus: PackedCorpus) -> None:
    assert build_continuations(corpus, 300, seed=0) == items
    assert build_continuations(corpus, 20, seed=0) == items[:20]
    assert build_continuations(corpus, 300, seed=1) != items


def test_without_the_context_answers_are_guesses(corpus: PackedCorpus) -> None:
    """To know how often each token occurs in the validation text itself does not help."""

    class Unigram(nn.Module):
        def __init__(self, counts: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(counts.log())

        def forward(self, tokens: Tensor) -> Tensor:
            return self.logits.expand(*tokens.shape, -1)

    items = build_continuations(corpus, 10**6, seed=0)
    tokens = torch.from_numpy(np.asarray(corpus.validation.tokens, np.int64))
    counts = torch.bincount(tokens, minlength=corpus.vocab_size) + 0.5
    result = continuation_accuracy(Unigram(counts), items, batch_size=64)
    assert result.accuracy == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / len(items)) ** 0.5)


def test_a_corpus_of_known_size_gives_its_number_of_items(tmp_path: Path) -> None:
    documents = [". ".join([*sentences, ""]) for sentences in generated_documents(200)]
    corpus = pack(tmp_path, documents, validation_fraction=0.25)
    num_documents = corpus.validation.num_documents
    # A sentence for each item of the cloze, and all but a document's first for a continuation.
    continuations = build_continuations(corpus, 10**6, seed=0)
    assert len(continuations) == num_documents * (SENTENCES_PER_DOCUMENT - 1) >= 2000
    cloze = build_cloze(corpus, 10**6, seed=0)
    assert len(cloze) == num_documents * SENTENCES_PER_DOCUMENT >= 2000
    assert len(build_continuations(corpus, 2000, seed=0)) == 2000
    for items in (continuations, cloze):
        assert {item.document for item in items} == set(range(num_documents))


def test_one_document_is_enough(tmp_path: Path) -> None:
    """Wrong continuations then share no token with the passage."""
    documents = [". ".join([*sentences, ""]) for sentences in generated_documents(10)]
    corpus = pack(tmp_path, documents, validation_fraction=1e-9)
    assert corpus.validation.num_documents == 1
    document = corpus.validation.document(0)
    windows = np.lib.stride_tricks.sliding_window_view(document, CONTINUATION_TOKENS)
    items = build_continuations(corpus, 10**6, seed=0)
    assert len(items) == SENTENCES_PER_DOCUMENT - 1
    for item in items:
        starts = [int((windows == each).all(axis=1).argmax()) for each in item.continuations]
        true = starts.pop(item.answer)
        first = true - len(item.context) + 1
        last = true + CONTINUATION_TOKENS
        for start in starts:
            assert start + CONTINUATION_TOKENS <= first or start >= last


def test_what_no_continuation_begins_with(tmp_path: Path) -> None:
    """A sentence of the training text, the end of one before it, or too little text."""
    refrain = "Hey ho the wind and the rain"
    documents = [
        # The tokenizer learns that `."` is one token, in which the next sentence would begin.
        '." '.join(sentences[:20])
        + '."'
        + "".join(f" {sentence}. {refrain}." for sentence in sentences[20:40])
        + f" O I do {'abcdefgh'[number % 8]} {'klmno'[number // 8]}."
        for number, sentences in enumerate(generated_documents(40))
    ]
    corpus = pack(tmp_path, documents, validation_fraction=0.25)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    assert len(tokenizer.encode('."').ids) == 2
    items = build_continuations(corpus, 10**6, seed=0)
    assert len(items) > 15 * corpus.validation.num_documents
    for item in items:
        assert {len(each) for each in item.continuations} == {CONTINUATION_TOKENS}
        for continuation in item.continuations:
            assert not tokenizer.decode(list(continuation)).strip().startswith(('."', "Hey", "O I"))
