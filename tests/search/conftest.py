"""What whole searches in the tests have in common."""

import pytest
import yaml
from small_search import NUM_CANDIDATES, SETTINGS, small_text
from small_space import space_config

from search import config as search_config


@pytest.fixture(scope="session")
def experiment(tmp_path_factory) -> list[str]:
    """The arguments of a search of seconds: a small text, small operators, few tokens."""
    folder = tmp_path_factory.mktemp("experiment")
    space = search_config.plain(space_config(max_operators=6))
    values = {
        **SETTINGS,
        "space": space,
        "data": small_text(folder),
        "evolution": {"initial_candidates": 3, "population_size": 3, "sample_size": 2},
        "num_candidates": NUM_CANDIDATES,
        "audit": {"candidates": 0},
        # Far above any: what is proposed then depends on losses alone, which repeat.
        "target_ms": 1e6,
    }
    (folder / "experiment").mkdir()
    # The seeds of the demo's space are not those of the test's.
    text = "# @package _global_\ndefaults:\n  - override /data: text\n" + yaml.safe_dump(values)
    (folder / "experiment" / "tiny.yaml").write_text(text)
    deleted = [f"~space.seeds.{name}" for name in ("mamba2_attention", "deltanet_mamba2")]
    return ["--config-dir", str(folder), "experiment=tiny", *deleted]
