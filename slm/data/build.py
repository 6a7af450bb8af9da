"""From a source of text to a packed corpus: read, split, learn a tokenizer, encode.

The digest of a corpus covers the configs and what identifies the source (versions, or sizes and
times of files), so that a second call reads nothing. Its folder appears complete or not at all; it
is written beside, step by step, and whoever comes after a kill goes on from the last whole shard.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from slm.config import ConfigError
from slm.data.config import DataConfig, TokenizerConfig
from slm.data.corpus import Source, open_source
from slm.data.encoding import Encoder, EncodingTask, encode_all
from slm.data.journal import Journal, Record, remove_unfinished
from slm.data.packing import (
    METADATA,
    SPLITS,
    TOKENIZER,
    CorruptCorpusError,
    PackedCorpus,
    read_metadata,
    starts_file,
)
from slm.data.spool import (
    Spool,
    is_held_out,
    is_text_step,
    is_worth_keeping,
    remove_text,
)
from slm.data.tokenizer import (
    build_tokenizer,
    end_of_text_id,
    tokenizer_identity,
    vocabulary_size,
)

logger = logging.getLogger(__name__)

# Part of the digest: raised when documents, splits or files come out otherwise than before.
FORMAT_VERSION = 2
# Bytes that a tokenizer is trained on.
TOKENIZER_TRAINING_BYTES = 256 * 2**20
Progress = Callable[[str], None]


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: Progress = logger.info,
    *,
    verify: bool = False,
) -> PackedCorpus:
    """Return the packed corpus of a configuration, which is built the first time.

    verify: read all of a corpus that is there, not only its files' sizes.

    Any number of processes may call it: one builds, the others wait. It starts processes to encode
    more than a few shards, which import the program that calls it: a script does its work below
    `if __name__ == "__main__"`, and imports little above. Files of a damaged corpus are
    named, and they alone are written again. Raises ConfigError if the text cannot be had; whole
    shards of what was read of it are kept.
    """
    source = open_source(data)
    identity = {
        "format": FORMAT_VERSION,
        "source": {data.source: source.identity},
        "validation_fraction": data.validation_fraction,
        "tokenizer": tokenizer_identity(tokenizer),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = data.cache_dir / f"{data.source}-{digest}"
    if folder.is_dir():
        try:
            return _open(folder, verify)
        except CorruptCorpusError as error:
            logger.warning("%s; building that again", error)
    data.cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data.cache_dir / f".{folder.name}.lock"):
        # Another process may have built it meanwhile.
        if not _is_intact(folder, verify):
            partial = data.cache_dir / f".{folder.name}.partial"
            _begin(folder, partial)
            journal = Journal(partial)
            try:
                counts = _build(journal, source, data, tokenizer, progress)
            except BaseException:
                if not is_worth_keeping(journal):
                    shutil.rmtree(partial)
                raise
            _finish(journal, {"digest": digest, "identity": identity} | counts)
            os.rename(partial, folder)
    return PackedCorpus.open(folder)


def _open(folder: Path, verify: bool) -> PackedCorpus:
    corpus = PackedCorpus.open(folder)
    if verify:
        corpus.verify()
    return corpus


def _is_intact(folder: Path, verify: bool) -> bool:
    try:
        _open(folder, verify)
    except CorruptCorpusError:
        return False
    return True


def _begin(folder: Path, partial: Path) -> None:
    """Make the folder to build in: what a killed process left, or what is left of a corpus."""
    if folder.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        os.rename(folder, partial)
    partial.mkdir(exist_ok=True)
    remove_unfinished(partial)
    journal = Journal(partial)
    if journal.records:
        return
    try:
        records = read_metadata(partial)["records"]
    except (CorruptCorpusError, KeyError):
        return
    for name, record in records.items():
        journal.add(name, record)


def _finish(journal: Journal, metadata: dict[str, Any]) -> None:
    """Write what a corpus says of itself, and take away what only its building needs."""
    records = {
        name: record for name, record in sorted(journal.records.items()) if not is_text_step(name)
    }
    content = json.dumps(metadata | {"records": records}, indent=1).encode()
    temporary = journal.folder / f".{METADATA}"
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, journal.folder / METADATA)
    remove_text(journal.folder)
    journal.remove()


def _build(
    journal: Journal,
    source: Source,
    data: DataConfig,
    config: TokenizerConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Do the steps that the journal does not hold; return the corpus's counts."""
    text = journal.records.get("text", {"num_shards": 0})
    steps = [journal.done(_step(number)) for number in range(text["num_shards"])]
    tokenizer_record = journal.done("tokenizer")
    if not steps or None in steps or tokenizer_record is None:
        spool, held_out = _read(journal, source, data, progress)
        _learn(journal, spool, held_out, config, progress)
        _encode(journal, spool, held_out, progress)
    shards = [journal.records[_step(n)] for n in range(journal.records["text"]["num_shards"])]
    facts = journal.records["tokenizer"]
    counts: dict[str, Any] = {
        "versions": {name: version(name) for name in ("tokenizers", "numpy")},
        "end_of_text": facts["end_of_text"],
        "vocab_size": facts["vocab_size"],
        "token_dtype": facts["token_dtype"],
    }
    for split in SPLITS:
        if journal.done(f"index-{split}") is None:
            _write_index(journal, split, shards)
        counts[split] = {
            "shard_tokens": [shard[split]["num_tokens"] for shard in shards],
            "num_documents": sum(shard[split]["num_documents"] for shard in shards),
            "num_bytes": sum(shard[split]["num_bytes"] for shard in shards),
        }
    return counts


def _read(
    journal: Journal, source: Source, data: DataConfig, progress: Progress
) -> tuple[Spool, list[np.ndarray]]:
    """The text in shards, and of each shard's documents whether they are held out."""
    progress(f"reading {data.source}")
    spool = Spool(journal, source)
    if not spool.shards:
        raise ConfigError([f"data: there is no text in source '{data.source}'"])
    if spool.num_kept:
        progress(f"{spool.num_kept} of {len(spool.shards)} shards of text were there")
    held_out = is_held_out(spool.hashes, data.validation_fraction)
    record = {"num_shards": len(spool.shards), "num_bytes": spool.num_bytes, "sha256": spool.digest}
    known = journal.records.get("text")
    if known is not None and known["sha256"] != spool.digest:
        logger.warning("the text of '%s' is another than it was; packing it anew", data.source)
        journal.forget([name for name in journal.records if not is_text_step(name)])
    journal.add("text", record | {"files": {}})
    ends = np.cumsum([len(shard.index) for shard in spool.shards])
    return spool, np.split(held_out, ends[:-1])


def _learn(
    journal: Journal,
    spool: Spool,
    held_out: list[np.ndarray],
    config: TokenizerConfig,
    progress: Progress,
) -> None:
    """Train or load the tokenizer, unless it is there."""
    if journal.done("tokenizer") is not None:
        return
    progress(f"building the tokenizer from {spool.num_bytes / 1e6:.1f} MB")
    documents = (
        text
        for shard, is_validation in zip(spool.shards, held_out, strict=True)
        for text in shard.texts(~is_validation)
    )
    tokenizer = build_tokenizer(config, _up_to(documents, TOKENIZER_TRAINING_BYTES))
    known = journal.records.get("tokenizer")
    vocab_size = vocabulary_size(tokenizer)
    with journal.step("tokenizer", TOKENIZER) as ((file,), record):
        file.write(tokenizer.to_str(pretty=True).encode())
        record["end_of_text"] = end_of_text_id(tokenizer)
        record["vocab_size"] = vocab_size
        record["token_dtype"] = "uint16" if vocab_size <= 2**16 else "uint32"
    if known is not None and known["files"] != record["files"]:
        logger.warning("the tokenizer is another than it was; packing the text anew")
        journal.forget([_step(number) for number in range(len(spool.shards))])


def _encode(journal: Journal, spool: Spool, held_out: list[np.ndarray], progress: Progress) -> None:
    """Encode the shards of text that are not encoded yet."""
    missing = [n for n in range(len(spool.shards)) if journal.done(_step(n)) is None]
    num_documents = sum(len(spool.shards[number].index) for number in missing)
    progress(f"packing {num_documents} documents")
    # Their index follows from the shards.
    journal.forget([f"index-{split}" for split in SPLITS])
    tasks = [EncodingTask(number, spool.shards[number], held_out[number]) for number in missing]
    encoder = Encoder(journal.folder, journal.records["tokenizer"]["token_dtype"])
    num_there = len(spool.shards) - len(missing)
    for done, (number, record) in enumerate(encode_all(encoder, tasks), start=num_there + 1):
        journal.add(_step(number), record)
        progress(f"packed {done} of {len(spool.shards)} shards")


def _write_index(journal: Journal, split: str, shards: list[Record]) -> None:
    """Gather where documents begin, in the whole split, from its shards."""
    with journal.step(f"index-{split}", starts_file(split)) as ((file,), _):
        num_tokens = 0
        for number, shard in enumerate(shards):
            starts = np.fromfile(journal.folder / starts_file(split, number), np.int64)
            file.write(starts + num_tokens)
            num_tokens += shard[split]["num_tokens"]


def _step(number: int) -> str:
    return f"shard-{number:05d}"


def _up_to(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    num_bytes = 0
    for document in documents:
        if num_bytes >= max_bytes:
            return
        num_bytes += len(document.encode())
        yield document
