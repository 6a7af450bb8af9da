from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slm.config import ConfigError
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.shakespeare import scenes
from slm.data.tokenizer import (
    END_OF_TEXT,
    build_tokenizer,
    end_of_text_id,
    load_tokenizer,
    vocabulary_size,
)

TEXT = ["To be, or not to be: that is the question.", "Whether 'tis nobler in the mind"] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(vocab_size=300), TEXT)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text).ids
    assert ids[0] == end_of_text_id(trained)
    assert end_of_text_id(trained) not in ids[1:]
    assert trained.decode(ids) == text


def test_a_spelled_special_token_stays_text(trained: Tokenizer, tmp_path: Path) -> None:
    text = f"before {END_OF_TEXT} after"
    trained.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (trained, load_tokenizer(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(text).ids
        assert ids.count(end_of_text_id(tokenizer)) == 1
        assert tokenizer.decode(ids) == text


def test_training_is_deterministic_and_small_corpora_give_small_vocabularies() -> None:
    config = TokenizerConfig(vocab_size=2000)
    documents = [document for document, _ in zip(scenes(), range(20), strict=False)]
    first, second = (build_tokenizer(config, documents) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert vocabulary_size(first) == 2000
    small = build_tokenizer(config, ["abc abc"])
    assert vocabulary_size(small) == small.get_vocab_size() < 300


def test_transformers_reads_it_alike(corpus: PackedCorpus) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(corpus.tokenizer_path))
    ours = load_tokenizer(corpus.tokenizer_path)
    assert theirs(TEXT[0])["input_ids"] == ours.encode(TEXT[0]).ids
    assert theirs.decode(ours.encode(TEXT[0]).ids, skip_special_tokens=True) == TEXT[0]


def save_pretrained(folder: Path, eos_token: str | None) -> None:
    """A byte-level tokenizer with a gap in its ids and an end of text in their middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"</s>": 300}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(folder)


def test_an_existing_tokenizer(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "hub", "</s>")
    config = TokenizerConfig(name="hub", pretrained=str(tmp_path / "hub"))
    plays = DataConfig(source="shakespeare", max_documents=5, cache_dir=tmp_path / "cache")
    corpus = prepare(plays, config)
    assert (corpus.end_of_text, corpus.vocab_size) == (300, 301)
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    assert end_of_text_id(tokenizer) == 300
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hub")
    first = corpus.train.document(0).tolist()
    text = next(text for text in scenes() if theirs(text)["input_ids"] == first)
    assert text.startswith("A Midsummer Night's Dream")


def test_existing_tokenizers_that_cannot_serve(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "no_end", None)

    def documents() -> Iterator[str]:
        raise AssertionError("an existing tokenizer needs no text")
        yield

    for folder, problem in (("no_end", "no end-of-text"), ("missing", "cannot be loaded")):
        config = TokenizerConfig(name="hub", pretrained=str(tmp_path / folder))
        with pytest.raises(ConfigError, match=f"{folder}.* {problem}"):
            build_tokenizer(config, documents())


def test_bad_files_and_configurations(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="greater than 256"):
        TokenizerConfig(vocab_size=256)
    with pytest.raises(ValueError, match="vocab_size: tokenizer 'bpe' needs it"):
        TokenizerConfig()
    with pytest.raises(ValueError, match="vocab_size: must be null"):
        TokenizerConfig(name="hub", pretrained="x", vocab_size=300)
