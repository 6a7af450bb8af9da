"""Public-domain prose out of Debian packages: Jane Austen's novels and two English Bibles.

`r-cran-janeaustenr` holds six novels, `sword-text-kjv` the King James Version and
`sword-text-web` the World English Bible.
"""

import html
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

AUSTEN = "r-cran-janeaustenr"
BIBLES = ("sword-text-kjv", "sword-text-web")
PACKAGES = (AUSTEN, *BIBLES)

CHAPTER_HEADING = re.compile(r"(?:CHAPTER|Chapter) (?:[IVXL]+|\d+)\.?")
VOLUME_HEADING = re.compile(r"VOLUME [IVX]+")
OSIS_CHAPTER = re.compile(r'<chapter [^>]*sID="([^"]+)"[^>]*/>(.*?)<chapter eID="\1"/>', re.DOTALL)
OSIS_APPARATUS = re.compile(r"<(note|title)\b.*?</\1>", re.DOTALL)
OSIS_LINE = re.compile(r"<(?:l|lb|lg|div|item)\b[^>]*>")
OSIS_TAG = re.compile(r"<[^>]*>")

# R's serialization format: a vector of strings, its elements, and the end of the header.
R_STRING_VECTOR = 16
R_STRING = 9
R_HEADER = struct.Struct(">2s3iI")


def chapters(packages: dict[str, Path]) -> Iterator[str]:
    """Yield each chapter of each book, given the folder of each of PACKAGES."""
    for novel in read_r_strings(_only(packages[AUSTEN], "**/data/Rdata.rdb")):
        yield from split_novel(novel)
    for package in BIBLES:
        module = _only(packages[package], "**/texts/ztext/*")
        for book in read_sword(module):
            yield from split_book(book)


def split_novel(lines: list[str]) -> Iterator[str]:
    """Yield the chapters of a hard-wrapped text, one line per paragraph; the front matter goes."""
    starts = [index for index, line in enumerate(lines) if CHAPTER_HEADING.fullmatch(line.strip())]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        kept = [line for line in lines[start:end] if not VOLUME_HEADING.fullmatch(line.strip())]
        text = "\n".join(line.rstrip() for line in kept)
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\n+", text))
        # Gutenberg's texts mark italics with underscores.
        yield (
            "\n\n".join(paragraph.replace("_", "") for paragraph in paragraphs if paragraph) + "\n"
        )


def split_book(osis: str) -> Iterator[str]:
    """Yield the chapters of a book in OSIS markup, without its notes and titles."""
    for chapter in OSIS_CHAPTER.finditer(osis):
        text = OSIS_LINE.sub("\n", OSIS_APPARATUS.sub("", chapter[2]))
        text = html.unescape(OSIS_TAG.sub("", text)).replace("¶", "")
        lines = (" ".join(line.split()) for line in text.split("\n"))
        yield "\n".join(line for line in lines if line) + "\n"


def read_sword(module: Path) -> Iterator[str]:
    """Yield the compressed blocks (books) of a SWORD zText module.

    `*.bzs` lists the offset, size and plain size of each block of `*.bzz`, little endian.
    """
    for testament in ("ot", "nt"):
        index = (module / f"{testament}.bzs").read_bytes()
        blocks = (module / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield zlib.decompress(blocks[offset : offset + size]).decode("utf-8")


def read_r_strings(path: Path) -> Iterator[list[str]]:
    """Yield each vector of strings of an R lazy-load database.

    The file is a row of objects, each a big-endian size and a zlib stream of R's serialization
    (R Internals, section 1.8). Raises ValueError on any other kind of object.
    """
    content = path.read_bytes()
    while content:
        stream = zlib.decompressobj()
        serialized = stream.decompress(content[4:])
        yield _r_string_vector(serialized, path)
        content = stream.unused_data


def _r_string_vector(serialized: bytes, path: Path) -> list[str]:
    form, version, _, _, encoding_size = R_HEADER.unpack_from(serialized)
    # Version 3 names its encoding; the flags of the object, its length and its elements follow.
    position = R_HEADER.size + encoding_size
    kind, length = struct.unpack_from(">II", serialized, position)
    if form != b"X\n" or version != 3 or kind & 0xFF != R_STRING_VECTOR:
        raise ValueError(f"{path}: holds something else than R vectors of strings")
    position += 8
    strings = []
    for _ in range(length):
        kind, size = struct.unpack_from(">Ii", serialized, position)
        assert kind & 0xFF == R_STRING
        position += 8
        # Size -1 stands for NA.
        strings.append(serialized[position : position + max(size, 0)].decode("utf-8"))
        position += max(size, 0)
    return strings


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: has {len(found)} files like {pattern}, expected one")
    return found[0]
