"""The table of a multirun holds one row per job, whatever became of the job."""

import csv
import json
from pathlib import Path

from slm.training.sweep import gather


def make_job(sweep_dir: Path, number: int, overrides: list[str], result: dict | None) -> None:
    job = sweep_dir / str(number)
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if result is not None:
        (job / "result.json").write_text(json.dumps(result))


def test_one_row_per_job(tmp_path: Path) -> None:
    for number in (10, 2):
        result = {"validation_loss": 1.5 + number, "config": {"optimizer.lr": 1}, "digest": "ab"}
        make_job(tmp_path, number, [f"model.depth={number}", "data.files=[a,b=c]"], result)
    make_job(tmp_path, 3, ["model.depth=3", "+extra=1"], None)
    (tmp_path / "multirun.yaml").touch()

    table = gather(tmp_path)
    assert table == tmp_path / "results.csv"
    # Again: the table itself is no job.
    gather(tmp_path)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["2", "3", "10"]
    assert [row["status"] for row in rows] == ["finished", "unfinished", "finished"]
    assert [row["model.depth"] for row in rows] == ["2", "3", "10"]
    assert [row["validation_loss"] for row in rows] == ["3.5", "", "11.5"]
    assert rows[0]["data.files"] == "[a,b=c]"
    assert rows[1]["+extra"] == "1"
    assert "config" not in rows[0]
