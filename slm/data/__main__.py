"""`python -m slm.data`: make a packed corpus ahead of training, or check one that is there."""

from omegaconf import DictConfig

from slm.config import entry_point, read, schema
from slm.data.build import prepare
from slm.data.config import DataConfig, TokenizerConfig


@schema
class PrepareConfig:
    """verify: read all of a corpus that is there, and write again what is damaged."""

    data: DataConfig
    tokenizer: TokenizerConfig
    verify: bool = False


def check(config: DictConfig) -> PrepareConfig:
    """The configuration, or the errors in it."""
    return read(PrepareConfig, config)


@entry_point("prepare", check)
def main(config: DictConfig) -> None:
    """Prepare the corpus, and print what it holds."""
    settings = check(config)
    corpus = prepare(settings.data, settings.tokenizer, progress=print, verify=settings.verify)
    print(f"{corpus.folder}: vocabulary {corpus.vocab_size:,}")
    for split in (corpus.train, corpus.validation):
        print(
            f"{split.name}: {split.num_documents:,} documents, {split.num_bytes / 1e6:,.1f} MB, "
            f"{len(split):,} tokens in {len(split.shard_tokens)} shards"
        )


if __name__ == "__main__":
    main()
