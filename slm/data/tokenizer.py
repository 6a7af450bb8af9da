"""Tokenizers: a byte-level BPE trained here, or an existing one.

Whatever its origin, a tokenizer puts the end of text before every text: `encode(text).ids` is the
document as it is packed, and `encode("").ids` the end of text alone. A text that spells a special
token out stays text.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from slm.config import ConfigError
from slm.data.config import TokenizerConfig

END_OF_TEXT = "<|endoftext|>"


def build_tokenizer(config: TokenizerConfig, documents: Iterable[str]) -> Tokenizer:
    """Train a tokenizer on documents, or load the existing one that the config names.

    A small corpus may have fewer merges to learn than asked for: `get_vocab_size()` tells.
    """
    if config.name == "hub":
        assert config.pretrained is not None
        tokenizer, end_of_text = _load_pretrained(config.pretrained)
    else:
        assert config.vocab_size is not None
        tokenizer, end_of_text = _train_bpe(config.vocab_size, documents), END_OF_TEXT
    tokenizer.post_processor = TemplateProcessing(
        single=f"{end_of_text} $A",
        special_tokens=[(end_of_text, tokenizer.token_to_id(end_of_text))],
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`. Raises ValueError naming a file that holds no tokenizer."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises bare exceptions.
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    # Not part of the file.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token before every document, which is also the target after its last token.

    Raises ValueError if the tokenizer puts nothing, or more than that, before a text.
    """
    before = tokenizer.encode("").ids
    if len(before) != 1:
        raise ValueError(
            f"the tokenizer must put one token before every text, it puts {len(before)}"
        )
    return before[0]


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: ids of an existing tokenizer may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_identity(config: TokenizerConfig) -> dict[str, Any]:
    """What tells one tokenizer from another, without loading it; JSON-able."""
    if config.name == "bpe":
        return {"bpe": config.vocab_size}
    assert config.pretrained is not None
    folder = Path(config.pretrained)
    states = {path.name: path.stat() for path in sorted(folder.glob("*")) if path.is_file()}
    files = {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
    return {"hub": config.pretrained, "files": files}


def _train_bpe(vocab_size: int, documents: Iterable[str]) -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _load_pretrained(name: str) -> tuple[Tokenizer, str]:
    """The tokenizer of a Hub repository or a local folder, and its end of text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"tokenizer.pretrained: '{name}' cannot be loaded: {reason}"]) from error
    if not tokenizer.is_fast:
        raise ConfigError([f"tokenizer.pretrained: '{name}' has no tokenizer.json"])
    if tokenizer.eos_token is None:
        raise ConfigError([f"tokenizer.pretrained: '{name}' has no end-of-text (eos) token"])
    return tokenizer.backend_tokenizer, tokenizer.eos_token
