"""What a person sees of a search: one line per candidate, and a live line in between."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from search.history import Quality
from search.quality import in_words

# What is done since so many candidates tells how fast the search is.
RECENT_CANDIDATES = 20


class Progress:
    """Prints lines; on a terminal also a live line that the next one replaces.

    total: candidates that the search will have evaluated. target_ms: latency that they must meet.
    quality: what their scores are.
    """

    def __init__(self, total: int, quality: Quality = "loss", out: TextIO | None = None):
        self.total = total
        self._quality = in_words(quality)
        self.target_ms: float | None = None
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        # What each worker does.
        self._live: dict[int, str] = {}
        # When how many candidates were done.
        self._done: deque[tuple[float, int]] = deque(maxlen=RECENT_CANDIDATES)

    def say(self, text: str) -> None:
        """One line."""
        erase = "\r\033[K" if self._is_terminal else ""
        print(f"{erase}{text}", file=self._out, flush=True)

    def live(self, text: str, worker: int = 0) -> None:
        """What a worker does at the moment; nothing unless the output is a terminal."""
        self._live[worker] = text
        if self._is_terminal:
            line = "  " + "  |  ".join(self._live[index] for index in sorted(self._live))
            columns = shutil.get_terminal_size().columns
            print(f"\r\033[K{line[: columns - 1]}", end="", file=self._out, flush=True)

    def live_of(self, worker: int) -> Callable[[str], None]:
        """`live` of one worker."""
        return lambda text: self.live(text, worker)

    def begin(self, num_done: int) -> None:
        """From now on time counts. num_done: candidates that were done before."""
        self._done.append((time.monotonic(), num_done))

    def candidate(
        self, row: dict[str, Any], best: dict[str, Any] | None, num_done: int, num_on_frontier: int
    ) -> None:
        """The line of a candidate that is done with a rung.

        best: the chosen one so far. num_done: candidates that are done with at least one.
        """
        self._done.append((time.monotonic(), num_done))
        parts = [f"#{row['number']:<3} {num_done}/{self.total}", f"{row['short']:<30}"]
        if row["width"] is not None:
            parts.append(f"w={row['width']:<4} {format_count(row['parameters'])}")
        if row["latency_ms"] is not None:
            parts.append(f"{format_latency(row)} (target {self.target_ms:.4g})")
        if row["rung"]:
            parts.append(f"rung {row['rung']}")
        if row["state"] == "scored":
            parts.append(f"{self._quality} {row['score']:.4f}")
        else:
            parts.append(f"{row['state']}: {row['error']}")
        if best is not None:
            parts.append(
                f"best {best['score']:.4f} (#{best['number']}), frontier {num_on_frontier}"
            )
        if (per_second := self._candidates_per_second()) > 0:
            parts.append(f"{3600 * per_second:.3g}/h")
            if num_done < self.total:
                parts.append(f"ETA {format_duration((self.total - num_done) / per_second)}")
        self.say("  ".join(parts))

    def _candidates_per_second(self) -> float:
        (begin_s, begin), (end_s, end) = self._done[0], self._done[-1]
        return (end - begin) / (end_s - begin_s) if end_s > begin_s else 0.0


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
