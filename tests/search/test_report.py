import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from programs import run_program

from search.report import operator_colors, report_content, write_report
from search.report_figures import ACCENT, LINE

OPERATORS = ["attention(head_dim=16)", "ffn", "deltanet(head_dim=16)", "ffn"]


def record(number: int, loss: float, latency_ms: float, **changes: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": "scored",
        "origin": "random",
        "seed_name": None,
        "parent": None,
        "factor": None,
        "genotype": {"meta_tokens": 8},
        "operators": OPERATORS,
        "short": "A F D F",
        "width": 64,
        "depth": 2,
        "architecture": f"width=64 vocab_size=100 | {' '.join(OPERATORS)}",
        "digest": f"{number:012x}",
        "parameters": 123456,
        "state_bytes": 4096,
        "predicted_ms": latency_ms * 1.1,
        "latency_ms": latency_ms,
        "latency_low_ms": latency_ms - 0.1,
        "latency_high_ms": latency_ms + 0.2,
        "tpot_ms": latency_ms / 64,
        "meets_target": latency_ms <= 10,
        "loss": loss,
        "score": loss,
        "bits_per_byte": loss / 2.7,
        "best_so_far": number == 0,
        "rungs": [
            {"tokens": 1000, "loss": loss, "score": loss, "finished_at": "2026-01-01T00:00:00Z"}
        ],
        "cloze_error": 0.59,
        "cloze_error_low": 0.56,
        "cloze_error_high": 0.62,
        "error": None,
        **changes,
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    scored = [record(0, 5.0, 9.0), record(1, 5.5, 6.0), record(2, 4.5, 12.0), record(3, 6.0, 8.0)]
    nothing = {"loss": None, "score": None, "latency_ms": None}
    lost = record(4, 0, 0) | {"state": "failed", "error": "worker <died>", "rungs": [], **nothing}
    members = [
        {**scored[number], "is_different": is_different}
        for number, is_different in ((1, True), (0, None), (2, False))
    ]
    search = {
        "name": "example",
        "quality": "loss",
        "status": "finished",
        "seed": 3,
        "started_at": "2026-01-01T00:00:00Z",
        "seconds": 12.0,
        "command": ["search", "space=demo"],
        "target_ms": 10.0,
        "target_source": "reference",
        "reference": {"name": "transformer", "digest": scored[3]["digest"], "latency_ms": 8.0},
        "limits": {},
        "workload": {"batch_size": 1, "prompt_tokens": 64, "new_tokens": 64, "dtype": "float32"},
        "device": {"name": "A & B processor"},
        "device_key": "a-b",
        "table": {"path": "table.json", "error": {"mape_percent": 3.21}},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu_count": 2},
    }
    frontier = {
        "chosen": scored[0]["digest"],
        "members": members,
        "hypervolume_history": [[n, 1000 * n, v] for n, v in enumerate((1.0, 1.5, 2.0, 2.0))],
    }
    for name, content in (
        ("search", search),
        ("candidates", [*scored, lost]),
        ("frontier", frontier),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


class Page(HTMLParser):
    """Text and addresses of a page, scripts apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.addresses, self.inside = "", [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.addresses += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text += data


def test_page_is_self_contained_and_names_the_chosen_one(run_folder: Path) -> None:
    page = Page(write_report(run_folder))
    assert page.addresses == []
    text = re.sub(r"\s+", " ", page.text)
    assert "The chosen architecture: #0" in text
    assert "of the 3 candidates measured within the target of 10.00 ms (4 were scored)" in text
    assert "#1) takes 6.00 ms instead of 9.00 ms and loses 0.5000 nats" in text
    assert "plain transformer (#3) reached 6.0000 nats in 8.00 ms, this one 5.0000 nats" in text
    assert "both after 1,000 training tokens" in text
    assert "9.00 [8.90, 9.20]" in text
    assert "41.0 [38.0, 44.0]" in text
    assert "A & B processor" in text
    assert "worker <died>" in text
    assert "Training of the winner" not in text


def test_figures_hold_every_scored_candidate(run_folder: Path) -> None:
    figure = report_content(run_folder)["figures"]["frontier"]
    for loss in (5.0, 5.5, 4.5, 6.0):
        assert re.search(rf'"y":\[[^\]]*\b{loss}\b', figure), loss


def test_ancestors_and_rungs_are_shown(run_folder: Path) -> None:
    content = report_content(run_folder)
    assert [record["number"] for record in content["lineage"]] == [0]
    assert content["figures"]["rungs"] is None
    path = run_folder / "candidates.json"
    candidates = json.loads(path.read_text())
    candidates[1] |= {"parent": 3, "factor": "ratio"}
    candidates[0] |= {"parent": 1, "factor": "order"}
    candidates[0]["rungs"].append({"tokens": 4000, "loss": 4.0, "score": 4.0, "finished_at": ""})
    candidates[0] |= {"loss": 4.0, "score": 4.0}
    path.write_text(json.dumps(candidates))
    content = report_content(run_folder)
    assert [record["number"] for record in content["lineage"]] == [3, 1, 0]
    assert '"x":[1000,4000]' in content["figures"]["rungs"]
    page = Page(write_report(run_folder))
    assert "Its lineage" in page.text
    assert "From rung to rung" in page.text
    # The plain transformer did not climb: what both have reached is compared.
    text = re.sub(r"\s+", " ", page.text)
    assert "Lowest loss (4.0000 nats)" in text
    assert "this one 5.0000 nats, both after 1,000 training tokens" in text


def test_what_the_audit_found_is_shown(run_folder: Path) -> None:
    assert "How far the scores can be trusted" not in Page(write_report(run_folder)).text
    path = run_folder / "frontier.json"
    noise = {"deviation": 0.0125, "low": 0.0101, "high": 0.0163, "degrees_of_freedom": 6}
    correlation = {"short_tokens": 1000, "long_tokens": 64000, "rho": 0.87, "n": 12}
    audit = {
        "tokens": 64000,
        "noise": {"loss": {**noise, "least_difference": 0.0433, "models": 3, "seeds": 3}},
        "rank_correlations": [
            {
                **correlation,
                **{"low": 0.7, "high": 0.95},
                **{"numbers": [3, 5], "short": [5.5, 5.25], "long": [4.5, 4.75]},
            }
        ],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"audit": audit}))
    text = re.sub(r"\s+", " ", Page(write_report(run_folder)).text)
    assert "0.0125 nats [0.0101, 0.0163]0.0433 nats3 × 3" in text
    assert "1,000 against 64,000 tokens: rank correlation 0.87 [0.70, 0.95] over 12 models" in text
    (figure,) = report_content(run_folder)["figures"]["rank_correlations"]
    assert '"x":[5.5,5.25],"y":[4.5,4.75]' in figure
    # The one that the noise leaves no difference to is told in words, in the table too.
    assert "Between it and #2 there is no difference" in text
    assert text.count("no difference") == 3


def test_another_objective_goes_by_its_name(run_folder: Path) -> None:
    for name in ("search", "candidates", "frontier"):
        path = run_folder / f"{name}.json"
        path.write_text(path.read_text().replace('"score": 5.0', '"score": 0.25'))
    search = json.loads((run_folder / "search.json").read_text())
    (run_folder / "search.json").write_text(json.dumps(search | {"quality": "cloze_error"}))
    text = re.sub(r"\s+", " ", Page(write_report(run_folder)).text)
    assert "Lowest cloze error (0.2500) of the 3 candidates" in text
    assert "share of wrong answers" in report_content(run_folder)["figures"]["frontier"]


def test_factors_are_named_if_they_are_told_from_zero(run_folder: Path) -> None:
    """Attention lowers the loss in all, the rest is chance."""
    assert "Which factors mattered" not in Page(write_report(run_folder)).text
    rng = random.Random(0)
    candidates = []
    for number in range(40):
        counts = [rng.randint(1, 4) for _ in range(3)]
        operators = [text for text, n in zip(OPERATORS[:3], counts, strict=True) for _ in range(n)]
        loss = 5 - 0.3 * counts[0] + rng.gauss(0, 0.1)
        candidates.append(record(number, loss, rng.uniform(5, 10), operators=operators))
    (run_folder / "candidates.json").write_text(json.dumps(candidates))
    content = report_content(run_folder)
    assert content["findings"].startswith(
        "At equal latency the loss was lower with more of: attention(head_dim=16)"
    )
    assert "deltanet" not in content["findings"]
    figure = content["figures"]["operators"]
    assert LINE in figure
    assert ACCENT not in figure
    assert content["figures"]["mutations"] is None
    assert "Which factors mattered" in Page(write_report(run_folder)).text
    search = json.loads((run_folder / "search.json").read_text())
    (run_folder / "search.json").write_text(json.dumps(search | {"quality": "cloze_error"}))
    content = report_content(run_folder)
    assert content["findings"].startswith("At equal latency the cloze error was lower with more of")
    assert "wrong answers in the word cloze: one standard" in content["figures"]["operators"]


def test_training_and_export_appear_once_there(run_folder: Path) -> None:
    train = run_folder / "train"
    train.mkdir()
    (train / "metrics.csv").write_text(
        "step,tokens,seconds,loss,lr,tokens_per_s,validation_loss,bits_per_byte\n"
        "10,1000,1.0,6.5,0.001,1000,,\n10,1000,1.0,,,,6.25,2.0\n"
    )
    result = {"validation_loss": 6.25, "bits_per_byte": 2.0, "tokens": 1000, "seconds": 1.0}
    (train / "result.json").write_text(json.dumps(result))
    export = {
        "path": "runs/example/export",
        "max_abs_logit_difference": 0.0,
        "cached_equals_uncached": True,
        "prompt": "ROMEO.",
        "sample": "ROMEO. <b>But soft</b>",
    }
    (run_folder / "export.json").write_text(json.dumps(export))
    text = Page(write_report(run_folder)).text
    assert "Validation loss 6.2500" in text
    assert "ROMEO. <b>But soft</b>" in text
    assert '"y":[6.25]' in report_content(run_folder)["figures"]["training"]


def test_a_search_that_has_scored_nothing(run_folder: Path) -> None:
    (run_folder / "candidates.json").unlink()
    (run_folder / "frontier.json").unlink()
    assert "No candidate has been scored yet" in Page(write_report(run_folder)).text


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_search_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "search.json").write_text(content)
    done = run_program("-m", "search.report", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'search.json'}: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_every_operator_has_a_colour_of_its_own() -> None:
    own = record(5, 5.0, 7.0, operators=["moving_average", "kda", "ffn", "attention(window=9)"])
    colors = operator_colors([record(0, 5.0, 9.0), own])
    assert set(colors) == {"attention", "deltanet", "ffn", "moving_average", "kda"}
    assert len(set(colors.values())) == len(colors)
