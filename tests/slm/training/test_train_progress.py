"""What a person sees: a bar that leaves nothing behind, or lines."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slm.training.progress import Progress, Standing

ROOT = Path(__file__).parents[3]
SHOW_CURSOR = "\033[?25h"
HIDE_CURSOR = "\033[?25l"
ERASE_LINE_ABOVE = "\033[1A\033[2K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def standing(step: int, seconds: float, seconds_left: float | None = None) -> Standing:
    return Standing(step, 100, seconds, seconds_left)


def test_the_rest_is_forecast_from_steps_or_time_whichever_ends_first() -> None:
    progress = Progress(io.StringIO())
    # A resumed run: 40 steps were done before, in 1000 s, on a slower machine.
    progress.begin(standing(40, 1000))
    assert progress.seconds_left(standing(40, 1001)) is None
    assert progress.seconds_left(standing(50, 1020)) == pytest.approx(2 * 50)
    assert progress.seconds_left(standing(50, 1020, 30)) == 30
    assert progress.seconds_left(standing(50, 1020, 300)) == pytest.approx(100)
    assert progress.seconds_left(standing(50, 1020, -1)) == 0
    assert standing(50, 1020).share == 0.5
    assert standing(50, 90, 10).share == pytest.approx(0.9)
    assert standing(50, 10, 90).share == 0.5


def test_a_terminal_shows_a_bar_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slm.training.progress.SECONDS_BETWEEN_DRAWINGS", 0.0)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    progress = Progress(terminal)
    progress.begin(standing(0, 0))
    progress.figures(standing(10, 20), "loss [b]3.2[/b]  1,234 tokens/s")
    progress.step(standing(10, 20))
    shown = terminal.getvalue()
    assert "step 10/100  loss [b]3.2[/b]  1,234 tokens/s  0:03:00 left" in shown
    assert "10%" in shown
    progress.say("step 10: validation loss 4.2")
    print("from elsewhere", file=sys.stderr)
    before = len(terminal.getvalue())
    progress.end()
    end = terminal.getvalue()[before:]
    assert SHOW_CURSOR in end
    assert end.endswith(ERASE_LINE_ABOVE)
    assert "validation loss 4.2" in terminal.getvalue()
    progress.say("after it")
    assert terminal.getvalue().endswith("after it\n")
    assert "\033" not in terminal.getvalue()[before + len(end) :]


def test_elsewhere_lines_are_printed_now_and_then() -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress.begin(standing(0, 0))
    for step in (1, 2):
        progress.step(standing(step, step))
        progress.figures(standing(step, step), f"loss {step}")
    progress.say("kept")
    progress._printed_s -= 5
    progress.figures(standing(3, 3), "loss 3")
    progress.end()
    assert out.getvalue().splitlines() == ["step 1/100  loss 1", "kept", "step 3/100  loss 3"]


def test_other_processes_than_the_first_say_nothing() -> None:
    terminal = Terminal()
    progress = Progress(terminal, is_shown=False)
    progress.begin(standing(0, 0))
    progress.figures(standing(1, 1), "loss 1")
    progress.step(standing(1, 1))
    progress.say("kept")
    progress.end()
    assert terminal.getvalue() == ""


def test_ctrl_c_leaves_a_clean_terminal(tmp_path: Path) -> None:
    words = "so the sea and the sun and the moon and the storm go on and on "
    (tmp_path / "text.txt").write_text(
        "\n<|endoftext|>\n".join(words * (2 + number) for number in range(30))
    )
    arguments = ["experiment=smoke", "data=text", "data.files=[text.txt]", "model.width=32"]
    arguments += ["tokenizer.vocab_size=300", "trainer.max_steps=1000000", "model.depth=1"]
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments, "trainer.validate_every_steps=1000000"],
        cwd=tmp_path,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = ""
    deadline = time.monotonic() + 120
    while " left" not in shown:
        assert time.monotonic() < deadline, shown
        shown += os.read(ours, 4096).decode(errors="replace")
    run.send_signal(signal.SIGINT)
    try:
        while piece := os.read(ours, 4096):
            shown += piece.decode(errors="replace")
    except OSError:
        # Linux says so when the other end is closed.
        pass
    os.close(ours)
    assert run.wait(60) == 130
    assert HIDE_CURSOR in shown
    end = shown.rpartition("stopping after this step")[2]
    assert SHOW_CURSOR in end
    assert end.rpartition(SHOW_CURSOR)[2].strip() == f"{ERASE_LINE_ABOVE}interrupted"
