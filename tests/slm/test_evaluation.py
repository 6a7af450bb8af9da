import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.cloze import ClozeItem
from slm.data.continuation import ContinuationItem
from slm.data.tokenizer import load_tokenizer
from slm.evaluation import (
    Stretch,
    bits_per_byte,
    cloze_accuracy,
    cloze_answers,
    clustered_interval,
    continuation_accuracy,
    continuation_answers,
    evaluate_loss,
    log_probabilities,
    wilson_interval,
)
from slm.model import LanguageModel

SENTENCES = ["The cat sat on the mat.", "Mat the on sat cat the.", "It rains.", "Why, 'tis so!"]


class Bigram(nn.Module):
    """Logits that depend on the last token alone; with targets, the loss."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(
        self, tokens: Tensor, documents: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        logits = self.table[tokens]
        return logits if targets is None else F.cross_entropy(logits.mT, targets)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    folder: Path = tmp_path_factory.mktemp("text")
    rows = [{"text": f"{SENTENCES[n % 4]} And {n} more: {SENTENCES[n % 3]}"} for n in range(120)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        source="text",
        files=(str(folder / "rows.jsonl"),),
        validation_fraction=0.2,
        cache_dir=folder / "cache",
    )
    return prepare(config, TokenizerConfig(vocab_size=280))


@pytest.fixture
def model(corpus: PackedCorpus) -> LanguageModel:
    operators = "attention(head_dim=8) deltanet(head_dim=8) ffn(ratio=2.0)"
    text = f"width=16 vocab_size={corpus.vocab_size} meta_tokens=2 | {operators}"
    model = LanguageModel(Architecture.parse(text))
    # Spread the logits: an untrained model's are all alike.
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


def test_loss_of_a_bigram_model(corpus: PackedCorpus) -> None:
    model = Bigram(torch.randn(corpus.vocab_size, corpus.vocab_size)).train()
    tokens = torch.from_numpy(np.asarray(corpus.validation.tokens, np.int64))
    used = (len(tokens) - 1) // 16 * 16
    expected = F.cross_entropy(model.table[tokens[:used]], tokens[1 : used + 1]).item()
    for batch_size in (1, 5, 1000):
        loss = evaluate_loss(model, corpus.validation, 16, batch_size)
        assert loss == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_loss_of_documents_on_their_own(corpus: PackedCorpus, model: LanguageModel) -> None:
    """In a row that holds the whole split, each document is as if it were alone."""
    split = corpus.validation
    total = 0.0
    for index in range(split.num_documents):
        # With the end of text before it; the target after it is the next one's.
        document = [corpus.end_of_text, *split.document(index).tolist(), corpus.end_of_text]
        if index == split.num_documents - 1:
            document.pop()
        tokens = torch.tensor([document])
        with torch.no_grad():
            losses = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum")
        total += losses.item()
    loss = evaluate_loss(model, split, len(split) - 1, 1)
    assert loss == pytest.approx(total / (len(split) - 1), rel=1e-4)


def test_part_of_a_split_is_spread_over_it(corpus: PackedCorpus) -> None:
    model = Bigram(torch.randn(corpus.vocab_size, corpus.vocab_size))
    tokens = torch.from_numpy(np.asarray(corpus.validation.tokens, np.int64))
    num_rows = (len(tokens) - 1) // 16
    rows = [0, num_rows // 3, 2 * num_rows // 3]
    losses = [
        F.cross_entropy(model.table[tokens[16 * row :][:16]], tokens[16 * row + 1 :][:16]).item()
        for row in rows
    ]
    for max_tokens in (48, 63):
        loss = evaluate_loss(model, corpus.validation, 16, 2, max_tokens=max_tokens)
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    one = evaluate_loss(model, corpus.validation, 16, 2, max_tokens=1)
    assert one == pytest.approx(losses[0], rel=1e-6)


def test_bits_per_byte_of_a_uniform_model(corpus: PackedCorpus) -> None:
    split = corpus.validation
    loss = evaluate_loss(Bigram(torch.zeros(corpus.vocab_size, corpus.vocab_size)), split, 8, 4)
    assert loss == pytest.approx(math.log(corpus.vocab_size), rel=1e-6)
    total_bits = math.log2(corpus.vocab_size) * len(split.tokens)
    assert bits_per_byte(loss, split) == pytest.approx(total_bits / split.num_bytes, rel=1e-6)


def alone(model: LanguageModel, tokens: list[int]) -> float:
    """Log-probability of a document after its first token, without batch or padding."""
    if len(tokens) == 1:
        return 0.0
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return -F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()


def test_stretches_score_as_they_do_alone(corpus: PackedCorpus, model: LanguageModel) -> None:
    """What a stretch adds to the log-probability of what is before it, by the chain rule."""
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    documents = [encoding.ids for encoding in tokenizer.encode_batch(SENTENCES)]
    assert {document[0] for document in documents} == {corpus.end_of_text}
    stretches = [
        Stretch(document, start)
        for document in documents
        for start in (1, 2, len(document) // 2, len(document) - 1)
    ]
    expected = [alone(model, d) - alone(model, d[:start]) for d, start in stretches]
    for batch_size in (1, 3, 16):
        scores = log_probabilities(model, stretches, batch_size)
        assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_cloze_accuracy_counts_the_right_ones(corpus: PackedCorpus, model: LanguageModel) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    scores = [alone(model, tokenizer.encode(sentence).ids) for sentence in SENTENCES]
    best = int(np.argmax(scores))
    items = [
        ClozeItem(tuple(SENTENCES), answer, document)
        for document, answer in enumerate((best, best, (best + 1) % 4))
    ]
    right = [True, True, False]
    assert cloze_answers(model, tokenizer, items, batch_size=5).tolist() == right
    result = cloze_accuracy(model, tokenizer, items, batch_size=5)
    assert result == clustered_interval(right, [0, 1, 2])
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.n == 3


def test_continuation_accuracy_counts_the_right_ones(
    corpus: PackedCorpus, model: LanguageModel
) -> None:
    generator = np.random.default_rng(0)
    items, right = [], []
    for number, length in enumerate((1, 9, 3, 30, 5, 2)):
        # The first token of a context is the end of text.
        context = (corpus.end_of_text, *generator.integers(1, corpus.vocab_size, length).tolist())
        continuations = generator.integers(1, corpus.vocab_size, (4, 6)).tolist()
        scores = [alone(model, [*context, *continuation]) for continuation in continuations]
        answer = (int(np.argmax(scores)) + number % 2) % 4
        items.append(
            ContinuationItem(context, tuple(map(tuple, continuations)), answer, number // 2)
        )
        right.append(number % 2 == 0)
    assert continuation_answers(model, items, batch_size=7).tolist() == right
    result = continuation_accuracy(model, items, batch_size=7)
    assert result == clustered_interval(right, [0, 0, 1, 1, 2, 2])
    assert result.accuracy == pytest.approx(0.5)


def test_scores_that_mean_nothing_are_refused(corpus: PackedCorpus) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    model = Bigram(torch.full((corpus.vocab_size, corpus.vocab_size), math.nan))
    continuation = ContinuationItem((0,), ((1,), (2,), (3,), (4,)), 0, 0)
    with pytest.raises(ValueError, match="not finite"):
        cloze_accuracy(model, tokenizer, [ClozeItem(tuple(SENTENCES), 0, 0)], 4)
    with pytest.raises(ValueError, match="not finite"):
        continuation_accuracy(model, [continuation], 4)
    with pytest.raises(ValueError, match="at least one item"):
        cloze_accuracy(model, tokenizer, [], 4)
    with pytest.raises(ValueError, match="at least one item"):
        continuation_accuracy(model, [], 4)


@pytest.mark.parametrize(
    ("num_right", "n", "low", "high"),
    # R: prop.test(num_right, n, correct = FALSE)
    [(50, 100, 0.4038315, 0.5961685), (10, 10, 0.7224672, 1.0), (0, 10, 0.0, 0.2775328)],
)
def test_wilson_interval(num_right: int, n: int, low: float, high: float) -> None:
    result = wilson_interval(num_right, n)
    assert (result.low, result.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high))


def test_clusters_of_equal_size_count_by_their_means() -> None:
    """The variance of a mean of cluster means, with Student's quantile for its few degrees."""
    right = [1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    clusters = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    share, variance = 7 / 12, statistics.variance([1.0, 0.25, 0.5]) / 3
    effective = share * (1 - share) / variance * (1.959964 / 4.302653) ** 2
    expected = wilson_interval(share * effective, effective)
    result = clustered_interval([bool(each) for each in right], clusters)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert (result.accuracy, result.n) == (pytest.approx(share), 12)


answers = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30)


@given(answers, st.integers(2, 5))
def test_asking_the_same_twice_tells_nothing_new(
    given_answers: list[tuple[bool, int]], copies: int
) -> None:
    right, _ = zip(*given_answers, strict=True)
    once = clustered_interval(right, range(len(right)))
    often = clustered_interval(right * copies, [*range(len(right))] * copies)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


@given(answers)
def test_clusters_never_narrow_the_interval(given_answers: list[tuple[bool, int]]) -> None:
    right, clusters = zip(*given_answers, strict=True)
    result = clustered_interval(right, clusters)
    alone = wilson_interval(sum(right), len(right))
    assert result.low <= alone.low + 1e-9
    assert result.high >= alone.high - 1e-9
    assert 0 <= result.low <= result.accuracy + 1e-9
    assert result.accuracy - 1e-9 <= result.high <= 1
    if len(set(clusters)) == 1:
        assert result == alone


def test_the_interval_over_clusters_holds_as_often_as_it_says() -> None:
    """Texts of unlike size and difficulty (beta-binomial), which Wilson's knows nothing of."""
    generator = np.random.default_rng(0)
    clustered = independent = 0
    for _ in range(400):
        sizes = generator.integers(5, 60, 40)
        right = [generator.random(size) < generator.beta(3, 5) for size in sizes]
        clusters = np.repeat(np.arange(40), sizes).tolist()
        answers = np.concatenate(right).tolist()
        result = clustered_interval(answers, clusters)
        clustered += result.low <= 3 / 8 <= result.high
        result = wilson_interval(sum(answers), len(answers))
        independent += result.low <= 3 / 8 <= result.high
    assert clustered / 400 > 0.92
    assert independent / 400 < 0.75
