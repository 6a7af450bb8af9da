from pathlib import Path

import pytest
import yaml

from latency.workload import Workload
from slm.config import CONFIG_DIR, ConfigError, read


def test_every_problem_is_named_with_its_value():
    with pytest.raises(ConfigError) as error:
        read(Workload, {"batch_size": 0, "prompt_tokens": -3, "new_tokens": 1})
    assert error.value.problems == [
        "batch_size: must be >= 1, got 0",
        "prompt_tokens: must be >= 1, got -3",
        "new_tokens: must be >= 2, got 1",
    ]


def test_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match=r"workload\.dtype: .*'float8'"):
        read(Workload, {"prompt_tokens": 1, "new_tokens": 2, "dtype": "float8"}, "workload")


def test_name_tells_workloads_apart():
    names = {
        str(Workload(batch_size=b, prompt_tokens=p, new_tokens=n, dtype=dtype))
        for b in (1, 2)
        for p in (3, 4)
        for n in (5, 6)
        for dtype in ("float32", "bfloat16")
    }
    assert len(names) == 16
    assert "b2-p3-n5-bfloat16" in names


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "workload").glob("*.yaml")), ids=str)
def test_shipped_workloads_are_valid(path: Path):
    assert read(Workload, yaml.safe_load(path.read_text())).max_tokens > 2
    assert path.read_text().startswith("# python -m latency ")
