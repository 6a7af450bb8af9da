import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm.config import ConfigError
from slm.data import DataConfig, PackedCorpus, PackedSplit, TokenizerConfig, prepare, spool
from slm.data.corpus import open_source
from slm.data.journal import Journal
from slm.data.packing import CorruptCorpusError
from slm.data.spool import is_held_out
from slm.data.tokenizer import load_tokenizer

# Shards of so much text: 30 scenes make about ten of them.
SMALL_SHARD = 20_000

BUILD = """
import sys, time
from pathlib import Path
from slm.data import DataConfig, TokenizerConfig, prepare, spool
spool.SHARD_BYTES = int(sys.argv[3])
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
    command = [sys.executable, "-c", BUILD, str(cache_dir), stop_at, str(SMALL_SHARD)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "ready\n"
    return process


def build(cache_dir: Path, **options: Any) -> tuple[PackedCorpus, list[str]]:
    """The corpus of BUILD, and what was said while it was built."""
    said: list[str] = []
    data = DataConfig(source="shakespeare", max_documents=30, cache_dir=cache_dir)
    return prepare(data, TokenizerConfig(vocab_size=300), said.append, **options), said


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "SHARD_BYTES", SMALL_SHARD)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> PackedCorpus:
    """A corpus of several shards that nothing has interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "SHARD_BYTES", SMALL_SHARD)
        corpus, _ = build(tmp_path_factory.mktemp("sharded"))
    assert len(corpus.train.shard_tokens) > 5
    return corpus


def files_of(corpus: PackedCorpus) -> dict[str, bytes]:
    """Every file of a corpus. The journal is gone, and the text."""
    return {path.name: path.read_bytes() for path in corpus.folder.iterdir()}


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


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that write files from here on."""
    begun: list[str] = []
    step = Journal.step

    def recording(journal: Journal, name: str, *files: str) -> AbstractContextManager:
        begun.append(name)
        return step(journal, name, *files)

    monkeypatch.setattr(Journal, "step", recording)
    return begun


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "steps"),
    [
        ("train-00002.tokens.bin", lambda path: os.truncate(path, 100), ["shard-00002"]),
        ("validation-00003.documents.bin", lambda path: path.write_bytes(b"1"), ["shard-00003"]),
        ("train.documents.bin", lambda path: path.unlink(), []),
        ("tokenizer.json", lambda path: path.write_text("{"), ["tokenizer"]),
    ],
)
@pytest.mark.usefixtures("_small_shards")
def test_damaged_files_are_named_and_they_alone_built_again(
    name, damage, steps, sharded: PackedCorpus, tmp_path: Path, caplog, monkeypatch
) -> None:
    folder = tmp_path / sharded.folder.name
    shutil.copytree(sharded.folder, folder)
    damage(folder / name)
    with pytest.raises(CorruptCorpusError, match=name):
        PackedCorpus.open(folder)
    done = record_steps(monkeypatch)
    with caplog.at_level(logging.WARNING):
        again, said = build(tmp_path)
    assert str(folder / name) in caplog.text
    assert "building that again" in caplog.text
    assert [step for step in done if not step.startswith(("text-", "index-"))] == steps
    # Where documents begin follows from the shards: nothing is read for it.
    assert bool(said) == bool(steps)
    assert files_of(again) == files_of(sharded)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"digest": "x"}'),
        lambda path: path.write_text("[]"),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.usefixtures("_small_shards")
def test_a_corpus_that_says_nothing_of_itself_is_built_anew(
    damage, sharded: PackedCorpus, tmp_path: Path
) -> None:
    folder = tmp_path / sharded.folder.name
    shutil.copytree(sharded.folder, folder)
    damage(folder / "metadata.json")
    with pytest.raises(CorruptCorpusError, match=r"metadata\.json"):
        PackedCorpus.open(folder)
    again, _ = build(tmp_path)
    assert files_of(again) == files_of(sharded)


@pytest.mark.usefixtures("_small_shards")
def test_altered_bytes_are_found_when_all_is_read(
    sharded: PackedCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / sharded.folder.name
    shutil.copytree(sharded.folder, folder)
    names = ("train-00001.tokens.bin", "validation.documents.bin")
    for name in names:
        flip(folder / name)
    corpus = PackedCorpus.open(folder)
    with pytest.raises(CorruptCorpusError) as caught:
        corpus.verify()
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        str(folder / name) for name in reversed(names)
    ]
    # Their sizes are right: only who asks for it has them found.
    assert build(tmp_path)[1] == []
    again, said = build(tmp_path, verify=True)
    assert f"packed {len(sharded.train.shard_tokens)} of" in said[-1]
    assert files_of(again) == files_of(sharded)
    again.verify()
    assert build(tmp_path, verify=True)[1] == []


def test_two_processes_build_once(tmp_path: Path) -> None:
    builds = [start_build(tmp_path, "never") for _ in range(2)]
    for each in builds:
        each.stdin.write("\n")
    outputs = [each.communicate(timeout=120)[0] for each in builds]
    assert sum(output.count("reading") for output in outputs) == 1
    (result,) = {output.splitlines()[-1] for output in outputs}
    assert result.startswith("digest")


@pytest.mark.parametrize("stage", ["building the tokenizer", "packing", "packed 2", "packed 9"])
@pytest.mark.usefixtures("_small_shards")
def test_a_killed_build_goes_on_where_it_was(
    stage: str, sharded: PackedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_build(tmp_path, stage)
    process.stdin.write("\n")
    while not process.stdout.readline().startswith(stage):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = tmp_path.glob(".*.partial")
    assert not list(tmp_path.glob("shakespeare-*"))
    journal = Journal(partial)
    assert "text-00009" in journal.records
    encoded = {name for name in journal.records if name.startswith("shard-")}
    assert len(encoded) >= int(stage.removeprefix("packed ")[:1] if "packed" in stage else 0)
    done = record_steps(monkeypatch)
    corpus, said = build(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))
    assert not any(name.startswith("text-") for name in done)
    assert not encoded & set(done)
    assert ("building the tokenizer" in " ".join(said)) == (stage == "building the tokenizer")
    assert files_of(corpus) == files_of(sharded)


@pytest.mark.usefixtures("_small_shards")
def test_a_build_killed_while_reading_goes_on_where_it_was(
    sharded: PackedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a moment of chance: once its fourth shard of text is there."""
    process = start_build(tmp_path, "never")
    process.stdin.write("\n")
    while not list(tmp_path.glob(".*.partial/text-00003.txt")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = tmp_path.glob(".*.partial")
    known = set(Journal(partial).records)
    assert "text-00002" in known
    done = record_steps(monkeypatch)
    corpus, _ = build(tmp_path)
    assert not known & set(done)
    assert files_of(corpus) == files_of(sharded)


@pytest.mark.usefixtures("_small_shards")
def test_a_torn_line_and_altered_text_cost_no_more_than_themselves(
    sharded: PackedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(message: str) -> None:
        if message.startswith("packed 3"):
            raise KeyboardInterrupt

    data = DataConfig(source="shakespeare", max_documents=30, cache_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, TokenizerConfig(vocab_size=300), stop)
    (partial,) = tmp_path.glob(".*.partial")
    with (partial / "journal.jsonl").open("ab") as file:
        file.write(b'["shard-00099", {"fil')
    flip(partial / "text-00004.txt")
    flip(partial / "train-00001.tokens.bin")
    done = record_steps(monkeypatch)
    corpus, _ = build(tmp_path)
    assert {"shard-00001", "text-00004"} <= set(done)
    assert not {"shard-00000", "shard-00002", "text-00000", "text-00003", "tokenizer"} & set(done)
    assert files_of(corpus) == files_of(sharded)


@pytest.mark.usefixtures("_small_shards")
def test_text_that_is_another_is_packed_anew(tmp_path: Path, caplog) -> None:
    """A stream that is read again need not be what it was."""
    hub = tmp_path / "hub"
    hub.mkdir()
    rows = [f"page {number} " * 400 for number in range(40)]

    def write(texts: list[str]) -> None:
        (hub / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        # What its identity is made of stays.
        os.utime(hub / "a.jsonl", (0, 0))

    config = DataConfig(
        source="hub", repository=str(hub), max_bytes=10**6, cache_dir=tmp_path / "cache"
    )
    write(rows)
    first = prepare(config, TokenizerConfig(vocab_size=300))
    write([text.replace("page", "leaf") for text in rows])
    (first.folder / "train-00001.tokens.bin").unlink()
    with caplog.at_level(logging.WARNING):
        second = prepare(config, TokenizerConfig(vocab_size=300))
    assert "the text of 'hub' is another than it was" in caplog.text
    assert all(text.startswith("leaf") for text in texts(second.train, second))
    second.verify()


def test_shards_read_as_one_array(sharded: PackedCorpus) -> None:
    for split in (sharded.train, sharded.validation):
        parts = [
            np.fromfile(path, np.uint16)
            for path in sorted(sharded.folder.glob(f"{split.name}-*.tokens.bin"))
        ]
        assert [len(part) for part in parts] == list(split.shard_tokens)
        whole = np.concatenate(parts)
        assert np.array_equal(np.asarray(split.tokens), whole)
        rng = np.random.default_rng(0)
        edges = np.cumsum([0, *split.shard_tokens])
        places = [*rng.integers(0, len(whole), 40), *edges, *(edges[1:] - 1)]
        for begin, end in itertools.pairwise(rng.permutation(places).tolist()):
            assert np.array_equal(split.tokens[begin:end], whole[begin:end])
    # Some shards have no document that is held out, and an empty file cannot be mapped.
    assert 0 in sharded.validation.shard_tokens


def test_shards_decide_nothing(sharded: PackedCorpus, tmp_path: Path) -> None:
    whole, _ = build(tmp_path)
    assert len(whole.train.shard_tokens) == 1
    for split, other in ((whole.train, sharded.train), (whole.validation, sharded.validation)):
        assert np.array_equal(np.asarray(split.tokens), np.asarray(other.tokens))
        assert np.array_equal(split.document_starts, other.document_starts)
        assert split.num_bytes == other.num_bytes
    assert whole.tokenizer_path.read_bytes() == sharded.tokenizer_path.read_bytes()


@pytest.mark.usefixtures("_small_shards")
def test_a_document_longer_than_all_else(tmp_path: Path) -> None:
    """Longer than a shard, than what is encoded at a time, than a row, than all others together."""
    long = " ".join(str(number * number) for number in range(150_000))
    assert len(long) > 1.2 * spool.BATCH_BYTES
    rows = ["a short one", long, "another", "a third", "a fourth"]
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    config = DataConfig(source="text", files=(str(path),), cache_dir=tmp_path / "cache")
    corpus = prepare(config, TokenizerConfig(vocab_size=300))
    assert sorted(texts(corpus.train, corpus) + texts(corpus.validation, corpus)) == sorted(rows)


def test_a_split_pickles_without_its_tokens(corpus: PackedCorpus) -> None:
    assert len(corpus.train.tokens) > 100_000
    content = pickle.dumps(corpus.train)
    assert len(content) < 2_000
    assert np.array_equal(pickle.loads(content).tokens, corpus.train.tokens)
