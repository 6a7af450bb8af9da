import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slm.config import ConfigError
from slm.data import DataConfig, PackedCorpus, PackedSplit, TokenizerConfig, prepare
from slm.data.corpus import open_source
from slm.data.packing import CorruptCorpusError
from slm.data.spool import is_held_out
from slm.data.tokenizer import load_tokenizer

BUILD = """
import sys, time
from pathlib import Path
from slm.data import DataConfig, TokenizerConfig, prepare
def progress(message):
    print(message, flush=True)
    if message.startswith(sys.argv[2]):
        time.sleep(600)
data = DataConfig(source="shakespeare", max_documents=30, cache_dir=Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
corpus = prepare(data, TokenizerConfig(vocab_size=300), progress)
print("digest", corpus.digest, len(corpus.train), flush=True)
"""


def start_build(cache_dir: Path, stop_at: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(cache_dir), stop_at]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    return process


def texts(split: PackedSplit, corpus: PackedCorpus) -> list[str]:
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    return [
        tokenizer.decode(split.document(index).tolist()) for index in range(len_documents(split))
    ]


def len_documents(split: PackedSplit) -> int:
    return len(split.document_starts)


def test_every_document_comes_back(corpus: PackedCorpus, plays: DataConfig) -> None:
    documents = list(open_source(plays).documents())
    train, validation = texts(corpus.train, corpus), texts(corpus.validation, corpus)
    assert len(train) + len(validation) == len(documents) == 60
    assert 3 <= len(validation) <= 24
    assert not set(train) & set(validation)
    # Each in the corpus's order.
    assert train == [document for document in documents if document in set(train)]
    assert validation == [document for document in documents if document in set(validation)]


def test_boundaries_and_sizes(corpus: PackedCorpus) -> None:
    assert corpus.vocab_size == 512
    for split in (corpus.train, corpus.validation):
        tokens = np.array(split.tokens)
        assert len(split) == len(tokens) == split.num_tokens
        assert tokens.dtype == np.uint16
        assert tokens.max() < corpus.vocab_size
        # The end of text stands before every document, and nowhere else.
        expected = np.flatnonzero(tokens == corpus.end_of_text)
        assert np.array_equal(split.document_starts, expected)
        assert split.num_bytes == sum(len(text.encode()) for text in texts(split, corpus))


def test_split_is_by_content(plays: DataConfig, corpus: PackedCorpus, tmp_path: Path) -> None:
    """A document's side depends on its text alone, whatever comes with it and in which order."""
    rows = [json.dumps({"text": text}) for text in open_source(plays).documents()]
    path = tmp_path / "reversed.jsonl"
    path.write_text("\n".join([*reversed(rows[:50]), *rows[:10]]))
    config = DataConfig(
        source="text", files=(str(path),), validation_fraction=0.2, cache_dir=tmp_path
    )
    other = prepare(config, TokenizerConfig(vocab_size=300))
    held_out = set(texts(other.validation, other))
    assert held_out
    assert held_out < set(texts(corpus.validation, corpus))
    assert not held_out & set(texts(other.train, other))


def test_held_out_share_and_small_numbers() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    assert is_held_out(hashes, 0.05).mean() == pytest.approx(0.05, abs=0.01)
    for fraction in (1e-9, 1 - 1e-9):
        few = is_held_out(hashes[:3], fraction)
        assert 0 < few.sum() < 3
    with pytest.raises(ConfigError, match="only one document"):
        is_held_out(np.repeat(hashes[:1], 5), 0.5)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    words = "\n".join(json.dumps({"text": f"{n:05d} {n * 7:07d}"}) for n in range(40_000))
    (tmp_path / "numbers.jsonl").write_text(words)
    config = DataConfig(
        source="text", files=(str(tmp_path / "numbers.jsonl"),), cache_dir=tmp_path / "cache"
    )
    corpus = prepare(config, TokenizerConfig(vocab_size=66_000))
    assert corpus.vocab_size == 66_000
    assert corpus.train.tokens.dtype == np.uint32
    assert texts(corpus.validation, corpus)[0] in words


def test_second_call_reads_nothing(
    plays: DataConfig, bpe: TokenizerConfig, corpus: PackedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.data.shakespeare.scenes", lambda: pytest.fail("the plays are read"))
    assert prepare(plays, bpe) == corpus


def test_what_decides_the_corpus_decides_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def write(number: int) -> None:
        path.write_text("\n".join(json.dumps({"text": f"text {n}"}) for n in range(number)))

    def digest(fraction: float = 0.2, vocab_size: int = 300) -> str:
        config = DataConfig(
            source="text",
            files=(str(path),),
            validation_fraction=fraction,
            cache_dir=tmp_path / "cache",
        )
        return prepare(config, TokenizerConfig(vocab_size=vocab_size)).digest

    write(20)
    digests = [digest(), digest(fraction=0.3), digest(vocab_size=301)]
    assert digest() == digests[0]
    write(21)
    digests.append(digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens.bin", lambda path: os.truncate(path, 100)),
        ("validation.documents.bin", lambda path: path.unlink()),
        ("tokenizer.json", lambda path: path.write_text("{")),
        ("metadata.json", lambda path: path.write_text("{")),
        ("metadata.json", lambda path: path.write_text('{"digest": "x"}')),
        ("metadata.json", lambda path: path.unlink()),
    ],
)
def test_damaged_corpora_are_named_and_built_again(
    name, damage, corpus: PackedCorpus, plays: DataConfig, bpe: TokenizerConfig, tmp_path, caplog
) -> None:
    cache_dir = tmp_path / "cache"
    folder = cache_dir / corpus.folder.name
    shutil.copytree(corpus.folder, folder)
    damage(folder / name)
    with pytest.raises(CorruptCorpusError, match=name):
        PackedCorpus.open(folder)
    moved = DataConfig(
        source="shakespeare", max_documents=60, validation_fraction=0.2, cache_dir=cache_dir
    )
    with caplog.at_level(logging.WARNING):
        again = prepare(moved, bpe)
    assert str(folder / name) in caplog.text
    assert "building the corpus again" in caplog.text
    assert again.folder == folder
    assert np.array_equal(again.train.tokens, corpus.train.tokens)


def test_two_processes_build_once(tmp_path: Path) -> None:
    builds = [start_build(tmp_path, "never") for _ in range(2)]
    for build in builds:
        build.stdin.write("\n")
    outputs = [build.communicate(timeout=120)[0] for build in builds]
    assert sum(output.count("reading") for output in outputs) == 1
    (result,) = {output.splitlines()[-1] for output in outputs}
    assert result.startswith("digest")


@pytest.mark.parametrize("stage", ["building the tokenizer", "packing the validation"])
def test_a_killed_build_leaves_nothing_wrong(stage: str, tmp_path: Path) -> None:
    build = start_build(tmp_path, stage)
    build.stdin.write("\n")
    while not build.stdout.readline().startswith(stage):
        assert build.poll() is None
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert list(tmp_path.glob(".*.partial"))
    assert not list(tmp_path.glob("shakespeare-*"))
    data = DataConfig(source="shakespeare", max_documents=30, cache_dir=tmp_path)
    corpus = prepare(data, TokenizerConfig(vocab_size=300))
    assert not list(tmp_path.glob(".*.partial"))
    fresh = prepare(
        DataConfig(source="shakespeare", max_documents=30, cache_dir=tmp_path / "other"),
        TokenizerConfig(vocab_size=300),
    )
    for part in ("train.tokens.bin", "validation.documents.bin", "tokenizer.json", "metadata.json"):
        assert (corpus.folder / part).read_bytes() == (fresh.folder / part).read_bytes()


def test_a_split_pickles_without_its_tokens(corpus: PackedCorpus) -> None:
    assert len(corpus.train.tokens) > 100_000
    content = pickle.dumps(corpus.train)
    assert len(content) < 2_000
    assert np.array_equal(pickle.loads(content).tokens, corpus.train.tokens)
