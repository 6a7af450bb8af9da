"""The readers of Debian's files, against files written here by the formats' descriptions."""

import struct
import zlib
from pathlib import Path

import pytest

from slm.config import ConfigError
from slm.data import DataConfig
from slm.data.corpus import open_source
from slm.data.prose import AUSTEN, BIBLES, chapters, read_r_strings, split_book, split_novel

NOVEL = [
    "A TALE",
    "",
    "VOLUME I",
    "",
    "CHAPTER I",
    "",
    "It was a _very_ long",
    "sentence. Chapter 2 is no heading here.",
    "",
    "“Déjà vu!”",
    "",
    "VOLUME II",
    "",
    "CHAPTER II",
    "",
    "The end.",
]
BOOK = (
    '<title type="main">Genesis</title><chapter n="1" osisID="Gen.1" sID="Gen.1"/>'
    '<title>How it began</title><div sID="gen3" type="x-p"/>¶In the <w lemma="x">beginning</w> '
    'God<note n="a">a <reference>b</reference></note> spoke.<div eID="gen3" type="x-p"/>'
    '<l level="1"/>First &amp; last<l level="1"/>  lines <chapter eID="Gen.1"/>between'
    '<chapter n="2" osisID="Gen.2" sID="Gen.2"/>Second.<chapter eID="Gen.2"/>'
)


def write_rdb(path: Path, vectors: list[list[str]]) -> None:
    """An R lazy-load database: serialization version 3, big endian (R Internals, 1.8)."""
    content = b""
    for strings in vectors:
        header = b"X\n" + struct.pack(">iiii", 3, 0x040201, 0x030500, 5) + b"UTF-8"
        body = struct.pack(">II", 16, len(strings))
        for string in strings:
            encoded = string.encode()
            body += struct.pack(">Ii", 0x00040009, len(encoded)) + encoded
        content += struct.pack(">I", len(header + body)) + zlib.compress(header + body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_sword(module: Path, testaments: dict[str, list[str]]) -> None:
    module.mkdir(parents=True)
    for name in ("ot", "nt"):
        index = blocks = b""
        for book in testaments.get(name, []):
            block = zlib.compress(book.encode())
            index += struct.pack("<III", len(blocks), len(block), len(book.encode()))
            blocks += block
        (module / f"{name}.bzs").write_bytes(index)
        (module / f"{name}.bzz").write_bytes(blocks)


def test_novel_chapters_are_reflowed() -> None:
    assert list(split_novel(NOVEL)) == [
        "CHAPTER I\n\nIt was a very long sentence. Chapter 2 is no heading here.\n\n“Déjà vu!”\n",
        "CHAPTER II\n\nThe end.\n",
    ]


def test_bible_chapters_lose_their_markup() -> None:
    assert list(split_book(BOOK)) == [
        "In the beginning God spoke.\nFirst & last\nlines\n",
        "Second.\n",
    ]


def test_chapters_of_all_packages(tmp_path: Path) -> None:
    write_rdb(tmp_path / AUSTEN / "usr/lib/R/janeaustenr/data/Rdata.rdb", [NOVEL, NOVEL[4:]])
    for bible, books in zip(BIBLES, ({"ot": [BOOK]}, {"nt": [BOOK, BOOK]}), strict=True):
        write_sword(tmp_path / bible / "usr/share/sword/modules/texts/ztext/module", books)
    found = list(chapters({name: tmp_path / name for name in (AUSTEN, *BIBLES)}))
    assert len(found) == 2 + 2 + 2 + 4
    assert found[2].startswith("CHAPTER I\n")
    assert found[-1] == "Second.\n"


def test_r_strings_round_trip_and_other_objects_are_refused(tmp_path: Path) -> None:
    write_rdb(tmp_path / "a.rdb", [NOVEL, ["", "x"]])
    assert list(read_r_strings(tmp_path / "a.rdb")) == [NOVEL, ["", "x"]]
    # A vector of integers (type 13).
    header = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8"
    other = header + struct.pack(">IIi", 13, 1, 7)
    (tmp_path / "b.rdb").write_bytes(struct.pack(">I", len(other)) + zlib.compress(other))
    with pytest.raises(ValueError, match=r"b\.rdb"):
        list(read_r_strings(tmp_path / "b.rdb"))


def test_without_apt_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="'r-cran-janeaustenr': apt-get is not on this machine"):
        open_source(DataConfig(source="prose", cache_dir=tmp_path))
    assert not list((tmp_path / "debian").glob("*_*"))


def test_fetched_packages_are_found_without_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (AUSTEN, *BIBLES):
        (tmp_path / "debian" / f"{name}_1.0_all").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    source = open_source(DataConfig(source="prose", cache_dir=tmp_path))
    assert source.identity[AUSTEN] == f"{AUSTEN}_1.0_all"
