"""What a person sees of a search: one line per candidate, and a live line in between."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


class Progress:
    """Prints lines; on a terminal also a live line that the next one replaces.

    total: candidates that the search will have evaluated.
    """

    def __init__(self, total: int, target_ms: float | None = None, out: TextIO | None = None):
        self.total = total
        self.target_ms = target_ms
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        self._durations: list[float] = []

    def say(self, text: str) -> None:
        """One line."""
        erase = "\r\033[K" if self._is_terminal else ""
        print(f"{erase}{text}", file=self._out, flush=True)

    def live(self, text: str) -> None:
        """Replace the live line; nothing unless the output is a terminal."""
        if self._is_terminal:
            print(f"\r\033[K  {text}", end="", file=self._out, flush=True)

    def candidate(self, row: dict[str, Any], best: dict[str, Any] | None, num_done: int) -> None:
        """The line of a candidate that is done. best: the chosen one so far."""
        parts = [f"#{row['number']:<3} {num_done}/{self.total}", f"{row['short']:<30}"]
        if row["width"] is not None:
            parts.append(f"w={row['width']:<4} {format_count(row['parameters'])}")
        if row["latency_ms"] is not None:
            parts.append(f"{format_latency(row)} (target {self.target_ms:.4g})")
        if row["state"] == "scored":
            parts.append(f"loss {row['loss']:.4f}")
        else:
            parts.append(f"{row['state']}: {row['error']}")
        if best is not None:
            parts.append(f"best {best['loss']:.4f} (#{best['number']})")
        if (left := self._seconds_left(num_done)) is not None:
            parts.append(f"ETA {format_duration(left)}")
        self.say("  ".join(parts))

    def add_duration(self, seconds: float) -> None:
        """Seconds that one candidate took, for the estimate of the time left."""
        self._durations.append(seconds)

    def _seconds_left(self, num_done: int) -> float | None:
        if not self._durations or num_done >= self.total:
            return None
        recent = self._durations[-10:]
        return (self.total - num_done) * sum(recent) / len(recent)


def format_count(number: int) -> str:
    """1234567 as '1.23M'."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def format_latency(row: dict[str, Any]) -> str:
    """Median and half the width of its interval, '8.31±0.05 ms'; '!' if something ran beside it."""
    half = (row["latency_high_ms"] - row["latency_low_ms"]) / 2
    mark = "" if row["latency_is_quiet"] else "!"
    return f"{row['latency_ms']:.4g}±{half:.1g} ms{mark}"


def format_duration(seconds: float) -> str:
    """200 as '3 min 20 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._start_s
