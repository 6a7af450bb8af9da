"""What a person sees of a search: one line per candidate, and how it stands in between."""

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
# What a worker does that nothing is left for.
WAITING = "waiting for the others"


class Progress:
    """Prints lines; on a terminal also how the search stands, which the next line replaces.

    total: candidates that the search will have evaluated. target_ms: latency that they must meet.
    quality: what their scores are.
    """

    def __init__(
        self,
        total: int,
        quality: Quality = "loss",
        num_workers: int = 1,
        out: TextIO | None = None,
    ) -> None:
        self.total = total
        self.num_workers = num_workers
        self._quality = in_words(quality)
        self.target_ms: float | None = None
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        # How the search stands, and what each worker does.
        self._standing = ""
        self._live: dict[int, str] = {}
        # Lines at the end of the terminal that are to be replaced.
        self._num_live_lines = 0
        # When how many candidates were done.
        self._done: deque[tuple[float, int]] = deque(maxlen=RECENT_CANDIDATES)

    def say(self, text: str) -> None:
        """One line."""
        self._print(f"{text}\n")

    def live(self, text: str, worker: int = 0) -> None:
        """What a worker does at the moment; shown only if the output is a terminal."""
        self._live[worker] = text
        if self._is_terminal:
            self._print("")

    def live_of(self, worker: int) -> Callable[[str], None]:
        """`live` of one worker."""
        return lambda text: self.live(text, worker)

    def left(self, worker: int) -> None:
        """A worker has ended."""
        self._live.pop(worker, None)

    def begin(self, num_done: int) -> None:
        """From now on time counts. num_done: candidates that were done before."""
        self._done.append((time.monotonic(), num_done))

    def end(self) -> None:
        """Nobody works any more: the live lines go."""
        self._standing, self._live = "", {}
        self._print("")

    def candidate(
        self, row: dict[str, Any], best: dict[str, Any] | None, num_done: int, num_on_frontier: int
    ) -> None:
        """The line of a candidate that is done with a rung.

        best: the chosen one so far. num_done: candidates that are done with at least one.
        """
        self._done.append((time.monotonic(), num_done))
        parts = [f"#{row['number']:<3}", f"{row['short']:<30}"]
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
        standing = []
        if best is not None:
            standing.append(f"best {best['score']:.4f} (#{best['number']})")
            standing.append(f"frontier {num_on_frontier}")
        if (per_hour := self.candidates_per_hour) > 0:
            standing.append(f"{per_hour:,.0f}/h" if per_hour >= 100 else f"{per_hour:.3g}/h")
            if num_done < self.total:
                seconds = 3600 * (self.total - num_done) / per_hour
                standing.append(f"{format_duration(seconds)} left")
        self._standing = "  ".join([f"{num_done}/{self.total}", *standing])
        self.say("  ".join(parts if self._is_terminal else [*parts, self._standing]))

    @property
    def candidates_per_hour(self) -> float:
        """Of late; 0 until the first is done."""
        (begin_s, begin), (end_s, end) = self._done[0], self._done[-1]
        return 3600 * (end - begin) / (end_s - begin_s) if end_s > begin_s else 0.0

    @property
    def busy_share(self) -> float:
        """Of the workers, how many neither wait nor have ended."""
        return sum(text != WAITING for text in self._live.values()) / self.num_workers

    def _print(self, text: str) -> None:
        """Text in the place of the live lines, and on a terminal those again."""
        if self._is_terminal:
            up = f"\033[{self._num_live_lines - 1}F" if self._num_live_lines > 1 else "\r"
            columns, rows = shutil.get_terminal_size()
            lines = [f"  {line}"[: columns - 1] for line in self._live_lines()][: rows - 1]
            self._num_live_lines = len(lines)
            text = f"{up}\033[J{text}" + "\n".join(lines)
        print(text, end="", file=self._out, flush=True)

    def _live_lines(self) -> list[str]:
        workers = sorted(self._live.items())
        if self.num_workers > 1:
            doing = [f"worker {index}  {text}" for index, text in workers]
        else:
            doing = [text for _, text in workers]
        return [self._standing, *doing] if self._standing else doing


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
