import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm.architecture import Architecture
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.cloze import ClozeItem
from slm.data.tokenizer import load_tokenizer
from slm.evaluation import (
    bits_per_byte,
    cloze_accuracy,
    evaluate_loss,
    sentence_log_probabilities,
    wilson_interval,
)
from slm.model import LanguageModel

SENTENCES = ["The cat sat on the mat.", "Mat the on sat cat the.", "It rains.", "Why, 'tis so!"]


class Bigram(nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.table[tokens]


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
    tokens = torch.from_numpy(corpus.validation.tokens.astype(np.int64))
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
    tokens = torch.from_numpy(corpus.validation.tokens.astype(np.int64))
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


def test_sentences_score_as_they_do_alone(corpus: PackedCorpus, model: LanguageModel) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    expected = []
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids])
        assert ids[0, 0] == corpus.end_of_text
        with torch.no_grad():
            log_probabilities = model(ids).log_softmax(-1)[0, :-1]
        expected.append(log_probabilities.gather(1, ids[0, 1:, None]).sum())
    for batch_size in (1, 3, 8):
        scores = sentence_log_probabilities(model, tokenizer, SENTENCES, batch_size)
        torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-3)


def test_cloze_accuracy_counts_the_right_ones(corpus: PackedCorpus, model: LanguageModel) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    best = int(sentence_log_probabilities(model, tokenizer, SENTENCES, 4).argmax())
    items = [ClozeItem(tuple(SENTENCES), answer) for answer in (best, best, (best + 1) % 4)]
    result = cloze_accuracy(model, tokenizer, items, batch_size=5)
    assert result == wilson_interval(2, 3)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.n == 3


def test_scores_that_mean_nothing_are_refused(corpus: PackedCorpus) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    model = Bigram(torch.full((corpus.vocab_size, corpus.vocab_size), math.nan))
    with pytest.raises(ValueError, match="not finite"):
        cloze_accuracy(model, tokenizer, [ClozeItem(tuple(SENTENCES), 0)], 4)
    with pytest.raises(ValueError, match="at least one item"):
        cloze_accuracy(model, tokenizer, [], 4)


@pytest.mark.parametrize(
    ("num_right", "n", "low", "high"),
    # R: prop.test(num_right, n, correct = FALSE)
    [(50, 100, 0.4038315, 0.5961685), (10, 10, 0.7224672, 1.0), (0, 10, 0.0, 0.2775328)],
)
def test_wilson_interval(num_right: int, n: int, low: float, high: float) -> None:
    result = wilson_interval(num_right, n)
    assert (result.low, result.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high))
