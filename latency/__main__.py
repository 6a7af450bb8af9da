"""`python -m latency`: measure a model on this device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from latency.device import Device
from latency.profile import Profile, profile
from latency.report import breakdown_table, profile_table
from latency.table import LatencyTable
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.config import entry_point, read, schema
from slm.kernels.backend import set_backend
from slm.model_config import ModelConfig
from slm.runtime import RuntimeConfig
from slm.training.files import write_atomically


@schema
class LatencyConfig(RuntimeConfig):
    """What `configs/latency.yaml` holds; its comments say what each field is."""

    name: str
    model: ModelConfig
    workload: Workload
    vocab_size: int
    device: Literal["cpu", "cuda"] | None
    threads: int | None
    breakdown: bool
    cache_dir: Path
    seed: int
    protocol: Protocol

    @property
    def device_type(self) -> str:
        """'cuda' or 'cpu': what is measured."""
        return self.device or super().device_type

    def architecture(self) -> Architecture:
        """The model; its own `vocab_size` goes before."""
        return self.model.architecture(self.model.vocab_size or self.vocab_size)


def check(config: DictConfig) -> tuple[LatencyConfig, Architecture, Device]:
    """Everything that is needed, or the errors that keep it from being measured."""
    settings = read(LatencyConfig, config)
    # The device's key depends on it.
    set_backend(settings.backend)
    return (
        settings,
        settings.architecture(),
        Device.current(threads=settings.threads, kind=settings.device),
    )


@entry_point("latency", check)
def main(config: DictConfig) -> Profile:
    """Measure, print, and write runs/<name>/latency.json."""
    from rich.console import Console

    settings, architecture, device = check(config)
    console = Console()
    measured = profile(architecture, settings.workload, device, settings.protocol, settings.seed)
    console.print(profile_table(measured))
    record: dict[str, Any] = measured.to_dict()
    if settings.breakdown:
        table = LatencyTable.load_or_build(
            [(operator, architecture.width) for operator in architecture.operators],
            architecture.vocab_size,
            settings.workload,
            device,
            meta_tokens=architecture.meta_tokens,
            normalize_logits=architecture.normalize_logits,
            cache_dir=settings.cache_dir,
            protocol=settings.protocol,
            progress=console.print,
        )
        console.print(breakdown_table(table, architecture))
        record["breakdown"] = [
            {"name": name, "count": count, **row.to_dict()}
            for name, count, row in table.terms(architecture)
        ]
        record["predicted"] = vars(table.predict(architecture))
    path = Path(HydraConfig.get().runtime.output_dir) / "latency.json"
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {path}")
    return measured


if __name__ == "__main__":
    main()
