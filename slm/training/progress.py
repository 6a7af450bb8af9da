"""What a person sees of training: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

# So often, at most, the bar is drawn: a few milliseconds each time.
SECONDS_BETWEEN_DRAWINGS = 0.5
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Standing:
    """How far training is.

    seconds, step: so far, with those of earlier processes of the run. seconds_left: of the time
    budget; None: there is none.
    """

    step: int
    max_steps: int
    seconds: float
    seconds_left: float | None

    @property
    def share(self) -> float:
        """How much is done, by steps or by time, whichever is nearer its end."""
        of_steps = self.step / self.max_steps
        if self.seconds_left is None:
            return of_steps
        return min(max(of_steps, self.seconds / (self.seconds + self.seconds_left)), 1.0)


class Progress:
    """Shows how training stands until `end`.

    The bar is drawn by whoever trains, between two steps: no thread draws it. What is printed to
    the standard streams meanwhile appears above it, and `end` leaves nothing of it.
    """

    def __init__(self, out: TextIO | None = None, *, is_shown: bool = True) -> None:
        self.out = out or sys.stderr
        self.is_shown = is_shown
        self._bar: rich.progress.Progress | None = None
        self._drawn_s = self._printed_s = -math.inf
        self._text = ""

    def begin(self, standing: Standing) -> None:
        """From here on time counts for the forecast."""
        self._first = standing
        if not self.is_shown or not self.out.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(file=self.out)
        if console.is_dumb_terminal:
            return
        # What stands in a text is no markup.
        text = TextColumn("{task.fields[text]}", markup=False)
        columns = (BarColumn(), TaskProgressColumn(), text)
        self._bar = Bar(*columns, console=console, auto_refresh=False, transient=True)
        self._bar.add_task("", total=1.0, text="")
        self._bar.start()

    def end(self) -> None:
        """Take the bar away; what follows is printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, standing: Standing) -> None:
        """A step is done."""
        now = time.monotonic()
        if self._bar is None or now - self._drawn_s < SECONDS_BETWEEN_DRAWINGS:
            return
        self._drawn_s = now
        parts = [f"step {standing.step}/{standing.max_steps}", self._text]
        left = self.seconds_left(standing)
        if left is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=standing.share, text="  ".join(filter(None, parts)))
        self._bar.refresh()

    def figures(self, standing: Standing, text: str) -> None:
        """What is known anew, in words."""
        self._text = text
        now = time.monotonic()
        if self._bar is None and now - self._printed_s >= SECONDS_BETWEEN_LINES:
            self.say(f"step {standing.step}/{standing.max_steps}  {text}")
            self._printed_s = now

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.is_shown:
            print(text, file=self.out, flush=True)

    def seconds_left(self, standing: Standing) -> float | None:
        """Until steps or time run out, if it goes on as since `begin`; None: too early to tell."""
        steps = standing.step - self._first.step
        by_steps = None
        if steps > 0:
            per_step = (standing.seconds - self._first.seconds) / steps
            by_steps = per_step * (standing.max_steps - standing.step)
        known = [each for each in (by_steps, standing.seconds_left) if each is not None]
        return max(0.0, min(known)) if known else None
