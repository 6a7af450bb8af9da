"""Whole searches by other objectives than the loss."""

import json
from pathlib import Path

import optuna
import pytest
import yaml
from small_search import compose_tiny

from search.proxy import load_weights
from search.run import Search
from slm.architecture import Architecture
from slm.config import ConfigError
from slm.data import PackedCorpus, prepare
from slm.data.cloze import build_cloze
from slm.data.continuation import build_continuations
from slm.data.tokenizer import load_tokenizer
from slm.evaluation import cloze_accuracy, continuation_accuracy
from slm.tasks import write_tasks


def read_json(path: Path):
    return json.loads(path.read_text())


def test_an_accuracy_can_be_the_objective(experiment, tmp_path):
    overrides = ("evolution.objectives=[continuation_error,latency_ms]", "num_candidates=2")
    summary = Search(compose_tiny(experiment, *overrides), tmp_path).run()
    rows = read_json(tmp_path / "candidates.json")
    (folder,) = {path.parent for path in Path(experiment[1]).glob("cache/**/tokenizer.json")}
    corpus = PackedCorpus.open(folder)
    items = build_continuations(corpus, 20, seed=0)
    for row in rows:
        architecture = Architecture.parse(row["architecture"])
        model = load_weights(architecture, tmp_path / "candidates" / row["checkpoint"])
        accuracy = continuation_accuracy(model, items, batch_size=16)
        assert row["score"] == row["continuation_error"] == pytest.approx(1 - accuracy.accuracy)
        assert row["continuation_error_low"] == pytest.approx(1 - accuracy.high)
        assert row["score"] != row["loss"]
    assert summary["quality"] == "continuation_error"
    best = min(rows, key=lambda row: (row["continuation_error"], row["latency_ms"]))
    assert summary["chosen"] == best["digest"]
    assert summary["hypervolume_point"][0] == 0.75
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["continuation_error", "latency_ms"]
    assert [trial.values[0] for trial in study.trials] == [row["score"] for row in rows]


def test_a_task_of_the_harness_can_be_the_objective(experiment, tmp_path):
    config = compose_tiny(experiment)
    corpus = prepare(config.data, config.tokenizer)
    made = write_tasks(corpus, ["cloze"], tmp_path, num_items=20, seed=0)
    description = yaml.safe_load((made / "cloze.yaml").read_text())
    (made / "cloze.yaml").unlink()
    (made / "mine.yaml").write_text(yaml.safe_dump(description | {"task": "mine"}))
    asked = (f"task.folder={made}", "evolution.objectives=[task_error,latency_ms]")
    overrides = (*asked, "num_candidates=2", "accuracy_items=0")
    with pytest.raises(ConfigError, match=r"task\.name: there is no 'mini'; near it: .*mine"):
        compose_tiny(experiment, *overrides, "task.name=mini")
    with pytest.raises(ConfigError, match=r"task\.name: task_error needs the name of a task"):
        compose_tiny(experiment, *overrides)

    run_folder = tmp_path / "run"
    run_folder.mkdir()
    without = compose_tiny(experiment, *overrides, "task.name=mine", "task.metric=f1")
    with pytest.raises(ConfigError, match=r"task\.metric: 'mine' has acc, got 'f1'"):
        Search(without, run_folder)
    assert not [*run_folder.iterdir()]
    summary = Search(compose_tiny(experiment, *overrides, "task.name=mine"), run_folder).run()
    tokenizer, items = load_tokenizer(corpus.tokenizer_path), build_cloze(corpus, 20, seed=0)
    for row in read_json(run_folder / "candidates.json"):
        architecture = Architecture.parse(row["architecture"])
        model = load_weights(architecture, run_folder / "candidates" / row["checkpoint"])
        # The same questions, by another way.
        accuracy = cloze_accuracy(model, tokenizer, items, batch_size=16)
        assert row["score"] == row["task_error"] == pytest.approx(1 - accuracy.accuracy)
        assert row["task_error_low"] < row["task_error"] < row["task_error_high"]
        assert row["task_error_items"] == 20
    assert summary["quality"] == "task_error"
    assert "mine, % [95 %]" in (run_folder / "report.html").read_text()
    # Another task is another search.
    other = compose_tiny(experiment, *overrides, "task.name=mine", "task.limit=10")
    with pytest.raises(ConfigError, match=r"task\.limit: the search .* was made with None"):
        Search(other, run_folder).run()
