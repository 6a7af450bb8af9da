"""`python -m latency`: measure a model on this device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field

from latency.device import Device
from latency.lock import device_lock
from latency.profile import Profile, profile
from latency.records import Records
from latency.report import breakdown_table, profile_table, request_line
from latency.roofline import Peaks
from latency.table import LatencyTable
from latency.throughput import throughput
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.config import ConfigError, entry_point, read, schema
from slm.decoding_step import CompileUnit
from slm.kernels.backend import set_backend
from slm.model_config import ModelConfig
from slm.runtime import RuntimeConfig
from slm.training.files import write_atomically

# What the rows of a breakdown are measured with: whole steps have no parts.
_ROW_UNIT: dict[CompileUnit, CompileUnit] = {
    "eager": "eager",
    "operator": "operator",
    "step": "operator",
}


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
    largest_batch: bool
    memory_limit_gib: Annotated[float, Field(gt=0)] | None
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
    peaks = Peaks.load_or_measure(device, settings.cache_dir, console.print)
    workload, protocol = settings.workload, settings.protocol
    if settings.largest_batch:
        limit_bytes = None
        if settings.memory_limit_gib is not None:
            limit_bytes = int(settings.memory_limit_gib * 2**30)
        try:
            measured = throughput(
                architecture, workload, device, protocol, settings.seed, limit_bytes, console.print
            )
        except (MemoryError, OSError) as error:
            raise ConfigError([f"largest_batch: {error}"]) from None
    else:
        measured = profile(architecture, workload, device, protocol, settings.seed)
    if measured.tpot_ms.median_ms <= 0:
        raise ConfigError(
            [
                f"workload.new_tokens: {workload.new_tokens} take less time than this machine's "
                "noise; ask for more of them, or for more time (protocol.max_seconds)"
            ]
        )
    bound = measured.roofline(peaks)
    console.print(profile_table(measured, bound))
    record: dict[str, Any] = {**measured.to_dict(), "roofline": bound.to_dict()}
    if settings.breakdown:
        table = LatencyTable.load_or_build(
            [(operator, architecture.width) for operator in architecture.operators],
            architecture.vocab_size,
            measured.workload,
            device,
            meta_tokens=architecture.meta_tokens,
            normalize_logits=architecture.normalize_logits,
            cache_dir=settings.cache_dir,
            # Rows are of operators, however the whole was compiled.
            protocol=replace(protocol, compile_unit=_ROW_UNIT[protocol.compile_unit]),
            progress=console.print,
        )
        assert table.reference_times is not None
        # What it took when the model was measured, above.
        table = table.slower(1 / measured.scale(table.reference_times))
        console.print(breakdown_table(table, architecture))
        record["breakdown"] = [
            {"name": name, "count": count, **row.to_dict()}
            for name, count, row in table.terms(architecture)
        ]
        predicted = table.predict(architecture)
        record["predicted"] = {**vars(predicted), "compile_unit": table.compile_unit}
    records = Records(settings.cache_dir, device)
    with device_lock(name=device.lock_name):
        before = records.read(architecture, measured.workload, measured.compile_unit)
        kept = records.write(record)
    if before is not None:
        console.print(f"before, {before['device']['date']}: {request_line(before)}")
    path = Path(HydraConfig.get().runtime.output_dir) / "latency.json"
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {path}, kept as {kept}")
    return measured


if __name__ == "__main__":
    main()
