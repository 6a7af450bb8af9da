"""`python -m search`: search for the best architecture within a latency target."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Run the search of the command line; see `configs/search.yaml`."""
    from search.worker import WorkerProcess

    # Both this process and that of the worker take seconds to import what they need.
    early: WorkerProcess | None = WorkerProcess.start("search.evaluate")

    from search.config import read_config, slurm_launcher
    from slm.config import entry_point

    def search(config: DictConfig) -> None:
        import signal
        from pathlib import Path

        from hydra.core.hydra_config import HydraConfig

        from search.run import Search
        from search.slurm_search import SlurmSearch

        # A scheduler's way to say stop ends the search as Ctrl-C does: in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        folder = Path(HydraConfig.get().runtime.output_dir)
        settings, launcher = read_config(config), slurm_launcher()
        # In a multirun there are several searches.
        nonlocal early
        process, early = early, None
        if launcher is None:
            Search(settings, folder, early=process).run()
        else:
            if process is not None:
                process.end(patience_s=0.0)
            SlurmSearch(settings, folder, launcher).run()

    entry_point("search", check=read_config)(search)()


if __name__ == "__main__":
    main()
