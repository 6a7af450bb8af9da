import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slm.config import ConfigError
from slm.data import DataConfig, TokenizerConfig, prepare, text_files
from slm.data.corpus import open_source
from slm.data.text_files import CUT_CHARACTERS, cut, read_files


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
        ("latin.txt", b"caf\xe9", "decode"),
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("broken.jsonl", b'{"text": "ok"}\n{bad\n', "JSON"),
        ("no_text.jsonl", b'{"body": "x"}\n', "without a string in the field 'text'"),
        ("number.jsonl", b'{"text": 5}\n', "without a string in the field 'text'"),
        ("broken.parquet", b"PAR1 and nothing else", "[Pp]arquet"),
    ],
)
def test_unreadable_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        list(read_files([tmp_path / name]))
    (message,) = caught.value.problems
    assert name in message
    assert "\n" not in message


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
    with pytest.raises(ValueError, match="max_bytes"):
        DataConfig(source="fineweb_edu")


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


def test_fineweb_edu_is_streamed_up_to_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local repository stands in for the Hub's: the same reader, the same subset."""
    (tmp_path / "sample").mkdir()
    table = pa.table({"text": [f"page {number:04d}" for number in range(5000)]})
    pq.write_table(table, tmp_path / "sample" / "000.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/*.parquet\n---\n"
    )
    monkeypatch.setattr(text_files, "FINEWEB_EDU", str(tmp_path))
    config = DataConfig(source="fineweb_edu", max_bytes=95)
    assert list(open_source(config).documents()) == [f"page {number:04d}" for number in range(10)]


def test_an_unreachable_repository_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "FINEWEB_EDU", str(tmp_path / "nowhere"))
    config = DataConfig(source="fineweb_edu", max_bytes=95)
    with pytest.raises(ConfigError, match=r"nowhere cannot be read: \w+") as caught:
        next(open_source(config).documents())
    assert "\n" not in str(caught.value)
