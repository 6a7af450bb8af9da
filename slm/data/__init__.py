"""Text to tokens: corpus -> tokenizer -> packed tokens on disk -> rows -> batches."""

from slm.data.config import DataConfig, TokenizerConfig
from slm.data.packing import PackedCorpus, PackedSplit, prepare

__all__ = ["DataConfig", "PackedCorpus", "PackedSplit", "TokenizerConfig", "prepare"]
