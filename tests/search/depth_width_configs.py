"""Configs of studies of depth and width."""

from pathlib import Path

from omegaconf import open_dict

from search.depth_width_config import DepthWidthConfig, read_config
from slm.config import compose


def compose_study(*overrides: str, config_dir: Path | None = None) -> DepthWidthConfig:
    """The config that a command line makes, with files of `config_dir` besides ours."""
    composed = compose("depth_width", overrides, config_dir=config_dir)[0]
    with open_dict(composed):
        del composed["hydra"]
    return read_config(composed)
