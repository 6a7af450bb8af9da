"""Measured profiles are kept: one file per architecture, workload and compile unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latency.device import Device
from latency.table_file import read_table, write_table
from latency.timer import Measurement
from latency.workload import Workload
from slm.architecture import Architecture
from slm.config import ConfigError, read

MEASUREMENTS = ("request_ms", "ttft_ms", "tpot_ms")


@dataclass(frozen=True)
class Records:
    """The profiles of one device, kept under `cache_dir`/latency/<device key>/profiles/.

    A record is what `Profile.to_dict` gives, and whatever its writer adds to it. A file that is
    none is named in a warning and kept aside, as a bad latency table is.
    """

    cache_dir: Path
    device: Device

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.cache_dir / "latency" / self.device.key / "profiles"

    def path(self, digest: str, workload: Workload, compile_unit: str) -> Path:
        """Where the record of an architecture, named by its digest, is kept."""
        return self.folder / str(workload) / f"{digest}-{compile_unit}.json"

    def write(self, record: dict[str, Any]) -> Path:
        """Keep a record; the one before it stays as `<name>.previous`.

        Raises ValueError if it is not a record of this device.
        """
        self._parse(record)
        workload = read(Workload, record["workload"])
        path = self.path(record["digest"], workload, record["compile_unit"])
        write_table(path, record)
        return path

    def read(
        self, architecture: Architecture, workload: Workload, compile_unit: str
    ) -> dict[str, Any] | None:
        """The record of such a measurement; None if there is none that can be believed."""

        def parse(values: Any) -> dict[str, Any]:
            record = self._parse(values)
            for name, expected, got in (
                ("architecture", str(architecture), record["architecture"]),
                ("workload", workload, read(Workload, record["workload"])),
                ("compile_unit", compile_unit, record["compile_unit"]),
            ):
                if got != expected:
                    raise ValueError(f"{name}: expected '{expected}', got '{got}'")
            return record

        return read_table(self.path(architecture.digest, workload, compile_unit), parse)

    def _parse(self, values: Any) -> dict[str, Any]:
        return parse_record(values, self.device.key)


def parse_record(values: Any, device_key: str) -> dict[str, Any]:
    """The record, as it is. Raises ValueError if it is not one of that device."""
    if not isinstance(values, dict):
        raise ValueError("no record")
    check_device(values, device_key)
    if not isinstance(values.get("architecture"), str):
        raise ValueError(f"architecture: expected its text, got {values.get('architecture')!r}")
    # Both become part of a file's name.
    for name in ("digest", "compile_unit"):
        if not re.fullmatch(r"[\w-]+", str(values.get(name, ""))):
            raise ValueError(f"{name}: expected a name, got {values.get(name)!r}")
    if not isinstance(values.get("workload"), dict):
        raise ValueError(f"workload: expected its fields, got {values.get('workload')!r}")
    try:
        read(Workload, values["workload"], "workload")
    except ConfigError as error:
        raise ValueError("; ".join(error.problems)) from None
    for name in MEASUREMENTS:
        try:
            Measurement.from_dict(values.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return values


def check_device(values: dict[str, Any], device_key: str) -> None:
    """Raise ValueError unless `values` were measured on that device."""
    device = values.get("device")
    key = device.get("key") if isinstance(device, dict) else None
    if key != device_key:
        raise ValueError(f"device.key: expected {device_key!r}, got {key!r}")
