"""`python -m search.depth_width`: how deep and how wide a model should be, here?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Run the study of the command line; see `configs/depth_width.yaml`."""
    from search.depth_width_config import read_config
    from slm.config import entry_point

    def study(config: DictConfig) -> None:
        import signal
        from pathlib import Path

        from hydra.core.hydra_config import HydraConfig

        from search.depth_width_run import DepthWidthStudy

        # A scheduler's way to say stop ends the study as Ctrl-C does: in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        folder = Path(HydraConfig.get().runtime.output_dir)
        DepthWidthStudy(read_config(config), folder).run()

    entry_point("depth_width", check=read_config)(study)()


if __name__ == "__main__":
    main()
