"""Perplexity: each token once, in the context it should have, in whatever pieces it is read."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from slm.architecture import Architecture
from slm.data.config import TokenizerConfig
from slm.data.tokenizer import build_tokenizer
from slm.evaluation import Stretch
from slm.hub.formats import FormatConfig, special_tokens, write_model
from slm.model import LanguageModel
from slm.perplexity import perplexity, ratio_estimate, windows
from slm.scoring import score_stretches

TEXTS = [
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "Ça va — être ou ne pas être ? " * 3,
    "Not a mouse stirring.",
]
OPERATORS = (
    "attention(head_dim=8) ffn(ratio=2.0) mamba2(head_dim=16,state_size=8) deltanet(head_dim=8) "
    "attention(head_dim=8,window=5)"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(name="bpe", vocab_size=290), TEXTS * 20)


@pytest.fixture
def model(tokenizer: Tokenizer) -> LanguageModel:
    return build(tokenizer, "meta_tokens=3", OPERATORS)


def build(tokenizer: Tokenizer, fields: str, operators: str) -> LanguageModel:
    text = f"width=32 vocab_size={tokenizer.get_vocab_size()} {fields} | {operators}"
    model = LanguageModel(Architecture.parse(text)).eval()
    # So that tokens matter.
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model


@torch.no_grad()
def token_nats(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Of each token after the first, all at once."""
    ids = torch.tensor([tokens])
    return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="none")


def test_whole_documents_are_scored_as_by_one_forward_pass(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    nats = [token_nats(model, tokenizer.encode(text).ids) for text in TEXTS]
    found = perplexity(model, tokenizer, TEXTS, batch_size=2)
    total, count = sum(each.sum().item() for each in nats), sum(map(len, nats))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.loss.value == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.bits_per_byte.value == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert (found.num_documents, found.num_tokens, found.num_bytes) == (3, count, num_bytes)


@pytest.mark.parametrize("piece_tokens", [1, 7, 16])
@pytest.mark.parametrize(
    "operators", [OPERATORS, "mamba ffn gated_deltanet(head_dim=8) rwkv7(head_dim=8)"]
)
def test_a_stream_is_scored_as_by_one_forward_pass(
    tokenizer: Tokenizer, operators: str, piece_tokens: int
) -> None:
    model = build(tokenizer, "meta_tokens=2", operators)
    stretches = [Stretch(tokenizer.encode(text).ids, start) for text in TEXTS for start in (1, 4)]
    scores = dict(score_stretches(model, stretches, 4, piece_tokens))
    for place, (tokens, start) in enumerate(stretches):
        expected = -token_nats(model, list(tokens))[start - 1 :].sum().item()
        assert scores[place].log_probability == pytest.approx(expected, rel=1e-4)


def test_logits_in_parts_are_logits(
    model: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, tokenizer, TEXTS, 3)
    monkeypatch.setattr("slm.scoring.LOGITS_AT_A_TIME", 5 * tokenizer.get_vocab_size())
    parts = perplexity(model, tokenizer, TEXTS, 3)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)


def test_greedy_is_what_the_model_would_have_said(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode(TEXTS[2]).ids
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    changed = [*tokens[:-1], (tokens[-1] + 1) % tokenizer.get_vocab_size()]
    start = len(tokens) - 4
    scores = dict(score_stretches(model, [Stretch(tokens, start), Stretch(changed, start)], 2))
    assert scores[0].is_greedy
    assert not scores[1].is_greedy


def test_a_stride_of_one_gives_every_token_a_whole_window(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    tokens, context = tokenizer.encode(TEXTS[0]).ids, 6
    expected = sum(
        token_nats(model, tokens[max(0, end - context) : end + 1])[-1].item()
        for end in range(1, len(tokens))
    )
    found = perplexity(model, tokenizer, TEXTS[:1], 8, context_tokens=context, stride_tokens=1)
    assert found.loss.value == pytest.approx(expected / (len(tokens) - 1), rel=1e-5)


def test_windows_that_do_not_overlap_are_independent(
    model: LanguageModel, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode(TEXTS[0]).ids
    context = next(n for n in (5, 4, 3, 2, 7) if (len(tokens) - 1) % n == 0)
    expected = sum(
        token_nats(model, tokens[begin : begin + context + 1]).sum().item()
        for begin in range(0, len(tokens) - 1, context)
    )
    found = perplexity(model, tokenizer, TEXTS[:1], 8, context_tokens=context)
    assert found.loss.value == pytest.approx(expected / (len(tokens) - 1), rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1), (100, 40)])
def test_windows_are_those_of_lm_eval(length: int, context: int, stride: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(length + 1))
    theirs = utils.get_rolling_token_windows(
        token_list=tokens[1:],
        prefix_token=tokens[0],
        max_seq_len=context,
        context_len=context - stride + 1,
    )
    expected = [([*read, scored[-1]], scored) for read, scored in theirs]
    found = [
        (list(each.tokens), list(each.tokens[each.start :]))
        for each in windows(tokens, context, stride)
    ]
    assert found == expected
    assert [token for _, scored in found for token in scored] == tokens[1:]


def test_it_is_what_transformers_says_of_an_export(
    model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    write_model(model, FormatConfig(), special_tokens(0), tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    total, count = 0.0, 0
    for text in TEXTS:
        tokens = tokenizer.encode(text).ids
        total += token_nats(lambda ids: theirs(ids).logits, tokens).sum().item()
        count += len(tokens) - 1
    found = perplexity(model, tokenizer, TEXTS, 3)
    assert found.loss.value == pytest.approx(total / count, rel=1e-5)


def test_the_interval_is_that_of_a_mean_where_documents_are_equally_long() -> None:
    totals = np.random.default_rng(0).normal(30, 4, 12)
    found = ratio_estimate(totals.tolist(), [10] * 12)
    expected = stats.t.interval(0.95, 11, totals.mean() / 10, stats.sem(totals) / 10)
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.value == pytest.approx(totals.mean() / 10)


def test_the_interval_holds_as_often_as_it_says() -> None:
    """Long documents easier than short ones, as of a source whose ratio is known."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        sizes = generator.integers(5, 200, 50)
        totals = sizes * (2 - sizes / 400) + generator.normal(0, 10, 50)
        found = ratio_estimate(totals.tolist(), sizes.tolist())
        every = np.arange(5, 200)
        truth = (every * (2 - every / 400)).sum() / every.sum()
        held += found.low <= truth <= found.high
    assert 0.92 < held / 400 < 0.98


def test_one_document_tells_nothing_of_others(model: LanguageModel, tokenizer: Tokenizer) -> None:
    found = perplexity(model, tokenizer, TEXTS[:1], 1)
    assert (found.loss.low, found.perplexity.high) == (None, None)


def test_what_means_nothing_is_refused(model: LanguageModel, tokenizer: Tokenizer) -> None:
    for documents in ([], [""]):
        with pytest.raises(ValueError, match="no text"):
            perplexity(model, tokenizer, documents, 1)
    with pytest.raises(ValueError, match="stride_tokens: must be <= context_tokens=4, got 5"):
        perplexity(model, tokenizer, TEXTS, 1, context_tokens=4, stride_tokens=5)
    torch.nn.init.constant_(model.norm.weight, 1e5)
    diverged = perplexity(model, tokenizer, TEXTS, 1)
    assert diverged.perplexity.value == math.inf
    assert math.isfinite(diverged.loss.value)
    torch.nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        perplexity(model, tokenizer, TEXTS, 1)
