"""Train one language model.

python train.py
python train.py experiment=smoke
python train.py -m model.depth=2,4 model.width=64,128
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from slm.config import entry_point
from slm.training.config import read_config


@entry_point("train", read_config)
def main(config: DictConfig) -> dict[str, float]:
    """Train in Hydra's output folder; the numbers of the result."""
    from slm.training.fit import fit

    return fit(read_config(config), Path(HydraConfig.get().runtime.output_dir)).metrics()


if __name__ == "__main__":
    main()
