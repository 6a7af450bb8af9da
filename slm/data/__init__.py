"""Text to tokens: corpus -> tokenizer -> packed tokens on disk -> rows -> batches."""

from slm.data.build import prepare
from slm.data.config import ComponentConfig, DataConfig, TokenizerConfig
from slm.data.packing import PackedCorpus, PackedSplit

__all__ = [
    "ComponentConfig",
    "DataConfig",
    "PackedCorpus",
    "PackedSplit",
    "TokenizerConfig",
    "prepare",
]
