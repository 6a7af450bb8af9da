"""A small packed corpus of real text."""

from pathlib import Path

import pytest

from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def plays(cache_dir: Path) -> DataConfig:
    return DataConfig(
        source="shakespeare", max_documents=60, validation_fraction=0.2, cache_dir=cache_dir
    )


@pytest.fixture(scope="session")
def bpe() -> TokenizerConfig:
    return TokenizerConfig(vocab_size=512)


@pytest.fixture(scope="session")
def corpus(plays: DataConfig, bpe: TokenizerConfig) -> PackedCorpus:
    return prepare(plays, bpe)
