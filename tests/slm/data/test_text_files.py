import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.config import ConfigError, read
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare, spool
from slm.data.corpus import Source, open_source
from slm.data.text_files import CHUNK_BYTES, CUT_CHARACTERS, cut, file_parts


def documents_of(*paths: Path, **options: int) -> list[str]:
    config = DataConfig(source="text", files=tuple(map(str, paths)), **options)
    return list(open_source(config).documents())


def test_each_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Héllo\n\nworld, no newline at the end")
    (tmp_path / "b.md").write_text("one\n<|endoftext|>\ntwo\nlines\n<|endoftext|>\n \n")
    rows = [{"text": "2024-01-01", "n": 1}, {"text": "smile 😀\n", "n": "x"}, {"text": "third"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.table({"text": ["first row", "second"], "n": [1, 2]}), tmp_path / "d.parquet")
    assert documents_of(tmp_path / "a.txt") == ["Héllo\n\nworld, no newline at the end"]
    assert documents_of(tmp_path / "b.md") == ["one\n", "two\nlines\n"]
    assert documents_of(tmp_path / "c.jsonl") == ["2024-01-01", "smile 😀\n", "third"]
    assert documents_of(tmp_path / "d.parquet") == ["first row", "second"]
    everything = documents_of(*(tmp_path / pattern for pattern in ("*.md", "*.txt", "?.[jp]*")))
    assert len(everything) == 1 + 2 + 3 + 2


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "é" * 50}) for _ in range(9)))
    assert len(documents_of(path, max_documents=4)) == 4
    # Two bytes each: 250 bytes hold two of 100.
    assert len(documents_of(path, max_bytes=250)) == 2


def test_a_long_text_is_cut_without_losing_anything() -> None:
    lines = [f"line {number} of the text\n" + "\n" * (number % 7 == 0) for number in range(9000)]
    lines = [line for entry in lines for line in entry.splitlines(keepends=True)]
    pieces = list(cut(lines))
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert max(map(len, pieces)) < 1.1 * CUT_CHARACTERS
    without_blanks = list(cut(["no blank line at all\n"] * 9000))
    assert max(map(len, without_blanks)) < 4.1 * CUT_CHARACTERS


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("binary.txt", b"\x7fELF\0\0\1", "binary"),
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 3 is 0xe9"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8: byte 13 is 0xe9"),
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("broken.jsonl", b'{"text": "ok"}\n{bad\n', "JSON"),
        ("no_text.jsonl", b'{"body": "x"}\n', "row 1 has no string in the field 'text'"),
        ("number.jsonl", b'{"text": 5}\n', "row 1 has no string in the field 'text'"),
        ("null.jsonl", b'{"text": "x"}\n{"text": null}\n', "row 2 has no string in the field"),
        ("broken.parquet", b"PAR1 and nothing else", "[Pp]arquet"),
    ],
)
def test_unreadable_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        documents_of(tmp_path / name)
    (message,) = caught.value.problems
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "place", "byte"),
    [
        # In the middle of a character, at both sides of where a file is read in chunks.
        (b"x" * (CHUNK_BYTES - 1) + b"\xc3" + b"(" + b"x" * 10, CHUNK_BYTES - 1, "c3"),
        (b"x" * (CHUNK_BYTES - 2) + "é".encode() + b"\xff", CHUNK_BYTES, "ff"),
        # A character that the file's end cuts off.
        ("é".encode() * 5 + b"\xe2\x82", 10, "e2"),
        (b"x" * CHUNK_BYTES + b"\xe2\x82", CHUNK_BYTES, "e2"),
    ],
)
def test_bytes_that_are_not_utf_8_are_named_before_anything_is_written(
    tmp_path: Path, content: bytes, place: int, byte: str
) -> None:
    good, bad, worse = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    good.write_text("héllo\n" * 9)
    bad.write_bytes(content)
    worse.write_bytes(b"\xff")
    assert content[place] == int(byte, 16)
    config = DataConfig(
        source="text", files=(str(good), str(bad), str(worse)), cache_dir=tmp_path / "cache"
    )
    with pytest.raises(ConfigError) as caught:
        prepare(config, TokenizerConfig(vocab_size=300))
    first, second = caught.value.problems
    assert f"data.files: '{bad}' is not UTF-8: byte {place:,} is 0x{byte}" in first
    assert f"'{worse}' is not UTF-8: byte 0 is 0xff" in second
    assert not [item for item in (tmp_path / "cache").iterdir() if item.suffix != ".lock"]


def test_characters_may_lie_across_chunks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * (CHUNK_BYTES - 1) + "é" * 10)
    assert len(file_parts([path])) == 1


def test_configurations_that_name_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    files = (str(tmp_path / "none.txt"), str(tmp_path / "a.csv"), str(tmp_path / "*.md"))
    with pytest.raises(ValueError, match="there is no file") as caught:
        DataConfig(source="text", files=files)
    assert all(name in str(caught.value) for name in ("none.txt", "a.csv", "*.md"))
    with pytest.raises(ValueError, match="needs files"):
        DataConfig(source="text")
    with pytest.raises(ValueError, match="only source 'text' has files"):
        DataConfig(source="shakespeare", files=(str(tmp_path / "a.csv"),))
    with pytest.raises(ConfigError) as caught_config:
        read(DataConfig, {"source": "hub", "files": [str(tmp_path / "a.csv")]})
    fields = [problem.partition(":")[0] for problem in caught_config.value.problems]
    assert fields == ["files", "repository", "files", "max_bytes"]
    with pytest.raises(ValueError, match="subset: only source 'hub' has subset, got source 'text'"):
        DataConfig(source="text", files=(str(tmp_path),), subset="x")
    with pytest.raises(ValueError, match=r"revision: the folder '.*' has none, got 'v1'"):
        DataConfig(source="hub", repository=str(tmp_path), revision="v1", max_bytes=95)


def test_another_revision_is_another_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(**fields: str) -> Source:
        return open_source(DataConfig(source="hub", repository="a/b", max_bytes=95, **fields))

    assert source(revision="v1").identity == {**source().identity, "revision": "v1"}

    def load(path: str, **options: object) -> None:
        raise ConnectionError(f"{path} at {options['revision']}")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ConfigError, match="a/b at v1"):
        next(source(revision="v1").documents())


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("A single document.")
    config = DataConfig(source="text", files=(str(path),), cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError, match="only one document"):
        prepare(config, TokenizerConfig(vocab_size=300))
    path.write_text(" \n\n ")
    with pytest.raises(ConfigError, match="is empty"):
        prepare(config, TokenizerConfig(vocab_size=300))
    assert not [item for item in (tmp_path / "cache").iterdir() if item.suffix != ".lock"]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out like a data set of the Hub: two subsets, of several files each."""
    folder = tmp_path / "hub"
    for subset in ("first", "second"):
        (folder / subset).mkdir(parents=True)
        for number in range(3):
            pages = [f"{subset} page {number} {row:04d}" for row in range(50)]
            table = pa.table({"id": list(range(50)), "text": pages})
            pq.write_table(table, folder / subset / f"{number:03d}.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: first/*.parquet\n"
        "- config_name: two\n  data_files: second/*.parquet\n---\n"
    )
    return folder


def test_a_data_set_is_streamed_up_to_its_limit(hub: Path) -> None:
    config = DataConfig(source="hub", repository=str(hub), subset="two", max_bytes=1050)
    expected = [f"second page {row // 50} {row % 50:04d}" for row in range(150)]
    assert list(open_source(config).documents()) == expected[: 1050 // len(expected[0])]
    everything = DataConfig(source="hub", repository=str(hub), subset="two", max_bytes=10**6)
    assert list(open_source(everything).documents()) == expected


def test_reading_goes_on_in_the_middle_of_a_data_set(hub: Path, tmp_path: Path) -> None:
    """And does not open the files that it has read."""
    config = DataConfig(source="hub", repository=str(hub), subset="one", max_bytes=10**6)
    source = open_source(config)
    expected = list(source.documents())
    for stop in (0, 1, 49, 50, 51, 149, 150):
        reader = source.open_reader(None)
        read = [next(reader) for _ in range(stop)]
        state = json.loads(json.dumps(reader.state()))
        assert read + list(source.open_reader(state)) == expected
    reader = source.open_reader(None)
    for _ in range(110):
        next(reader)
    # The first one tells the columns.
    (hub / "first" / "001.parquet").write_bytes(b"no longer there")
    assert list(source.open_reader(reader.state())) == expected[110:]


def overwrite(path: Path, content: bytes) -> None:
    """Change a file behind the back of whoever knows files by size and time."""
    state = path.stat()
    assert len(content) == state.st_size
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_stream_that_breaks_off_keeps_what_was_read(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable files stand for a connection that is lost."""
    monkeypatch.setattr(spool, "SHARD_BYTES", 500)

    def build(cache: str) -> PackedCorpus:
        config = DataConfig(
            source="hub",
            repository=str(hub),
            subset="one",
            max_bytes=10**6,
            cache_dir=tmp_path / cache,
        )
        return prepare(config, TokenizerConfig(vocab_size=300))

    expected = build("whole")
    last = hub / "first" / "002.parquet"
    content = last.read_bytes()
    overwrite(last, b"\0" * len(content))
    with pytest.raises(ConfigError, match="hub' cannot be read"):
        build("broken")
    assert len(list((tmp_path / "broken").glob(".*.partial/text-*.txt"))) == 3
    overwrite(last, content)
    again = build("broken")
    for file in expected.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes()


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    config = DataConfig(source="hub", repository=str(tmp_path / "nowhere"), max_bytes=95)
    with pytest.raises(ConfigError, match=r"nowhere' cannot be read: \w+") as caught:
        next(open_source(config).documents())
    assert "\n" not in str(caught.value)
