"""How people read what candidates are ranked by."""

from __future__ import annotations

from search.history import Quality

# What follows a number.
UNITS: dict[Quality, str] = {
    "loss": " nats",
    "cloze_error": "",
    "continuation_error": "",
    "task_error": "",
}
# What a figure calls its axis.
AXES: dict[Quality, str] = {
    "loss": "validation loss, nats per token",
    "cloze_error": "share of wrong answers in the word cloze",
    "continuation_error": "share of wrong continuations",
    "task_error": "share of wrong answers in the task",
}


def in_words(quality: Quality) -> str:
    """'cloze_error' as 'cloze error'."""
    return quality.replace("_", " ")


def format_score(score: float, quality: Quality) -> str:
    """'5.1234 nats'."""
    return f"{score:.4f}{UNITS[quality]}"
