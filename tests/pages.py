"""What a page of the documentation holds: commands to type, and files to save."""

import re
from pathlib import Path


def page_commands(page: Path) -> list[str]:
    """The lines of its unnamed code blocks that start a program, comments left out."""
    blocks = page_blocks(page, "")
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "make "))]


def page_blocks(page: Path, language: str) -> list[str]:
    """Its code blocks in a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.M)
    return [content for name, content in blocks if name == language]
