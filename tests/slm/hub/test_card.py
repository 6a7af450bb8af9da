"""The model card: what it says, and of which files it says it."""

import json
from pathlib import Path

import pytest

from slm.architecture import Architecture
from slm.evaluation_results import Figure, Result, add_results
from slm.hub.card import RunFacts, draw, model_card

TEXT = "width=32 vocab_size=64 meta_tokens=3 | deltanet(head_dim=8) ffn deltanet(head_dim=8) ffn"
ARCHITECTURE = Architecture.parse(f"{TEXT} attention(head_dim=8)")


def card(facts: RunFacts, format: str = "slm") -> str:
    return model_card(
        ARCHITECTURE,
        facts,
        name="tiny",
        path="user/tiny",
        prompt="To be",
        license="apache-2.0",
        format=format,
    )


def read(run: Path) -> RunFacts:
    return RunFacts.read(run, ARCHITECTURE, [run / "weights"])


def measurement(median_ms: float, converged: bool = True) -> dict[str, object]:
    low, high = median_ms * 0.99, median_ms * 1.01
    return {
        "median_ms": median_ms,
        "low_ms": low,
        "high_ms": high,
        "n": 20,
        "converged": converged,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with all that a card can tell of."""
    result = {
        "tokens": 12345,
        "bits_per_byte": 1.75,
        "config": {"data.source": "shakespeare", "optimizer.lr": 0.004, "seed": 3},
    }
    latency = {
        "architecture": str(ARCHITECTURE),
        "device": {"model": "A CPU", "limit": "2 threads"},
        "workload": {"batch_size": 1, "prompt_tokens": 64, "new_tokens": 32, "dtype": "float32"},
        "compile_unit": "step",
        "request_ms": measurement(100.0),
        "ttft_ms": measurement(10.0, converged=False),
        "tpot_ms": measurement(2.5),
    }
    for name, content in {"result": result, "latency": latency}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "weights").write_bytes(b"of a model")
    cloze = Result({"acc": Figure(0.5, low=0.4, high=0.6)}, n=2000, settings={}, seed=0)
    mine = Result({"acc": Figure(0.25)}, n=4, settings={}, seed=0)
    results = {"cloze": cloze, "mine": mine}
    add_results(tmp_path / "evaluation.json", tmp_path, [tmp_path / "weights"], results)
    rows = [f"{step},{5 - step / 100},\n{step},,{4 - step / 100}" for step in range(10, 310, 10)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,loss,validation_loss", *rows]))
    return tmp_path


def test_a_card_tells_what_lies_in_the_folder(run: Path) -> None:
    text = card(read(run))
    for line in (
        "| Device | A CPU, 2 threads |",
        "| Workload | batch 1, 64 prompt tokens, 32 new ones, float32 |",
        "| Request | 100.000 ms [99.000, 101.000], n = 20 |",
        "| First token | 10.000 ms [9.900, 10.100], not converged, n = 20 |",
        "| Tokens seen | 12,345 |",
        "| `data.source` | `shakespeare` |",
        "| `optimizer.lr` | `0.004` |",
        "| cloze | acc | 0.5000 | 0.4000 – 0.6000 | 2,000 |",
        "| mine | acc | 0.2500 |  | 4 |",
    ):
        assert line in text.splitlines()
    assert "`seed`" not in text
    curve = text.partition("| Step | Validation loss |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = curve.splitlines()
    # Evenly spread, from the first to the last.
    assert len(rows) == 10
    assert rows[0] == "| 10 | 3.9000 |"
    assert rows[-1] == "| 300 | 1.0000 |"


def test_a_card_says_nothing_of_what_is_not_there(run: Path, tmp_path: Path) -> None:
    bare = card(RunFacts())
    assert not {"## Latency", "## Training", "## Evaluation"} & set(bare.splitlines())
    # Measured of another model.
    other = Architecture.parse("width=32 vocab_size=64 | ffn")
    assert "Latency" not in card(RunFacts.read(run, other, [run / "weights"]))
    (run / "latency.json").write_text("{")
    (run / "weights").write_bytes(b"trained on")
    again = card(read(run))
    assert not {"## Latency", "## Evaluation"} & set(again.splitlines())
    assert "## Training" in again


def test_how_to_load_depends_on_the_format() -> None:
    assert "trust_remote_code=True" in card(RunFacts())
    native = card(RunFacts(), "native")
    assert "from_pretrained(path)" in native
    assert "trust_remote_code" not in native
    assert "AutoModel" not in card(RunFacts(), "nemotron_flash")


def test_layers_that_repeat_are_drawn_once() -> None:
    assert draw(ARCHITECTURE).splitlines() == [
        "tokens → embedding 64 × 32, tied to the head",
        "after 3 learned meta tokens",
        "┃  + deltanet(head_dim=8)",
        "┃  + ffn   ×2, from deltanet(head_dim=8) on",
        "│  + attention(head_dim=8)",
        "norm → head → 64 logits",
    ]
    text = "width=32 vocab_size=9 normalize_logits=True tie_embeddings=False | ffn ffn ffn"
    assert draw(Architecture.parse(text)).splitlines() == [
        "tokens → embedding 9 × 32, not tied",
        "┃  + ffn   ×3",
        "norm → head → 9 logits, each over the norm of its row",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"config": [1]}'),
        ("latency.json", json.dumps({"architecture": str(ARCHITECTURE)})),
        ("metrics.csv", "step,validation_loss\nlast,1.0"),
        ("metrics.csv", "loss,validation_loss\n1.0,1.0"),
    ],
)
def test_facts_of_another_shape_are_left_out(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    assert "## Use" in card(read(run))
