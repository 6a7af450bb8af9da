"""What a person sees, on a terminal and in a file."""

import io
import os
import re

import pytest

from search.progress import WAITING, Progress

ROW = {
    **{"number": 0, "short": "[A F]", "width": 64, "parameters": 1_234_567, "rung": 0},
    **{"state": "scored", "score": 4.5, "error": None, "latency_is_quiet": True},
    **{"latency_ms": 9.0, "latency_low_ms": 8.9, "latency_high_ms": 9.1},
}


class Terminal(io.StringIO):
    """Keeps what is on the screen: the cursor goes home, up, and erases all that is below it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, row = [""], 0
        for token in re.findall(r"\x1b\[\d*[A-Z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if token == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif token.endswith("F") and token[0] == "\x1b":
                row -= int(token[2:-1])
                assert row >= 0
            elif token == "\x1b[J":
                lines[row:] = [""]
            elif token != "\r":
                lines[row] += token
        return lines


@pytest.fixture(autouse=True)
def _size(monkeypatch: pytest.MonkeyPatch) -> None:
    size = os.terminal_size((80, 5))
    monkeypatch.setattr("shutil.get_terminal_size", lambda: size)


def started(out: io.StringIO, num_workers: int) -> Progress:
    progress = Progress(10, "loss", num_workers, out)
    progress.target_ms = 10.0
    progress.begin(0)
    return progress


def test_the_terminal_ends_with_how_it_stands_and_what_each_worker_does() -> None:
    terminal = Terminal()
    progress = started(terminal, num_workers=2)
    progress.say("hello")
    progress.live("#0 measuring", 0)
    progress.live("#1 measuring", 1)
    progress.live("#1 training", 1)
    assert terminal.screen() == ["hello", "  worker 0  #0 measuring", "  worker 1  #1 training"]
    progress.candidate(ROW, ROW, num_done=1, num_on_frontier=3)
    progress.live(WAITING, 0)
    hello, line, standing, *workers = terminal.screen()
    assert hello == "hello"
    assert "loss 4.5000" in line
    assert "best" not in line
    assert re.fullmatch(r"  1/10  best 4\.5000 \(#0\)  frontier 3  [\d,]+/h  \d+ s left", standing)
    assert workers == [f"  worker 0  {WAITING}", "  worker 1  #1 training"]
    progress.end()
    assert terminal.screen() == [hello, line, ""]


def test_live_lines_that_do_not_fit_are_cut() -> None:
    terminal = Terminal()
    progress = started(terminal, num_workers=9)
    for worker in range(9):
        progress.live("x" * 100, worker)
    progress.say("hello")
    lines = terminal.screen()
    assert lines[0] == "hello"
    # A line that filled its row, or as many as there are rows, would make the terminal scroll.
    assert len(lines) == 1 + 4
    assert max(map(len, lines)) == 79


def test_in_a_file_each_line_says_how_it_stands() -> None:
    file = io.StringIO()
    progress = started(file, num_workers=1)
    progress.live("#0 measuring")
    progress.candidate(ROW, ROW, num_done=1, num_on_frontier=3)
    progress.end()
    (line,) = file.getvalue().splitlines()
    assert "\x1b" not in line
    assert "loss 4.5000  1/10  best 4.5000 (#0)  frontier 3" in line


def test_share_of_the_workers_that_work() -> None:
    progress = started(io.StringIO(), num_workers=4)
    assert progress.busy_share == 0.0
    for worker, text in enumerate(["#0 measuring", WAITING, "#2 training", "#3 training"]):
        progress.live(text, worker)
    assert progress.busy_share == 0.75
    progress.left(2)
    assert progress.busy_share == 0.5
