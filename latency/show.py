"""`python -m latency.show`: everything that has been measured, by device. Changes no file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from latency.records import MEASUREMENTS, check_device, parse_record
from latency.roofline import Peaks
from latency.timer import Measurement
from latency.workload import Workload
from slm.config import entry_point, read, schema
from slm.operators import OPERATORS

EXIT_NOTHING_MEASURED = 1

T = TypeVar("T")


@schema
class ShowConfig:
    """cache_dir: where latency tables, peaks and profiles are kept."""

    cache_dir: Path


def check(config: DictConfig) -> ShowConfig:
    """The configuration, or the errors in it."""
    return read(ShowConfig, config)


@dataclass
class Measured:
    """What the folder of a device holds.

    device: as `Device.describe` gave it; empty if no file can be read.
    records: measured profiles; tables: rows by width and operator, by the table's name.
    skipped: one line per file that is not what its place says.
    """

    key: str
    device: dict[str, Any] = field(default_factory=dict)
    peaks: Peaks | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, dict[int, dict[str, Measurement]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def measured_devices(cache_dir: Path) -> list[Measured]:
    """Every device that something was measured on, by key."""
    folders = sorted(path for path in (cache_dir / "latency").glob("*") if path.is_dir())
    return [read_folder(folder) for folder in folders if any(folder.rglob("*.json"))]


def read_folder(folder: Path) -> Measured:
    """What was measured on the device whose folder it is; bad files stay where they are."""
    found = Measured(folder.name)

    def load(path: Path, parse: Callable[[Any, str], T]) -> T | None:
        try:
            values = json.loads(path.read_bytes())
            result = parse(values, found.key)
        except (OSError, ValueError) as error:
            found.skipped.append(f"{path}: skipped: {' '.join(str(error).split())}")
            return None
        found.device = found.device or values["device"]
        return result

    peaks_path = folder / "peaks.json"
    if peaks_path.exists():
        found.peaks = load(peaks_path, Peaks.from_dict)
    for path in sorted(folder.glob("profiles/*/*.json")):
        record = load(path, parse_record)
        if record is not None:
            found.records.append(record)
    for path in sorted(folder.glob("*.json")):
        if path != peaks_path:
            rows = load(path, _parse_rows)
            if rows is not None:
                found.tables[path.stem] = rows
    return found


def _parse_rows(values: Any, device_key: str) -> dict[int, dict[str, Measurement]]:
    """Rows of a latency table, by width. Raises ValueError if it is not one of that device."""
    if not isinstance(values, dict) or not isinstance(values.get("rows"), dict):
        raise ValueError("no rows")
    check_device(values, device_key)
    rows: dict[int, dict[str, Measurement]] = {}
    for width, measured in values["rows"].items():
        if not isinstance(measured, dict):
            raise ValueError(f"rows.{width}: expected an object, got {measured!r}")
        rows[int(width)] = {name: Measurement.from_dict(row) for name, row in measured.items()}
    return rows


def print_measured(found: Measured, console: Console) -> None:
    """A device: its peaks, models and operators, and the files that were skipped."""
    console.rule(found.key)
    if found.device:
        console.print(_device_line(found.device))
    if found.peaks:
        console.print(_peaks_line(found.peaks))
    if found.records:
        console.print(records_table(found.records))
    for name, rows in found.tables.items():
        console.print(rows_table(name, rows))
    for line in found.skipped:
        # Whole, however narrow the terminal is.
        console.print(line, soft_wrap=True)


def _device_line(device: dict[str, Any]) -> str:
    parts = [str(device.get("model")), str(device.get("limit"))]
    for name in ("driver", "backend"):
        parts.append(f"{name} {device.get(name)}")
    for name in ("torch", "triton", "fla"):
        version = device.get(f"{name}_version")
        if version:
            parts.append(f"{name} {version}")
    return ", ".join(parts)


def _peaks_line(peaks: Peaks) -> str:
    flops = ", ".join(
        f"{rate / 1e9:.1f} GFLOP/s {name}" for name, rate in peaks.flops_per_s.items()
    )
    return (
        f"peaks: {peaks.read_bytes_per_s / 1e9:.1f} GB/s read, {flops}; "
        f"{peaks.other_cpus_busy:.1f} CPUs were busy with other work"
    )


def records_table(records: list[dict[str, Any]]) -> Table:
    """Measured models: medians in ms, below each the ends of its 95 % interval."""
    table = Table(
        title="models, ms",
        caption="below each median: its 95 % interval",
        show_lines=True,
    )
    table.add_column("model", overflow="fold")
    for name in ("request", "first token", "per token", "roofline"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        request, first_token, per_token = (
            Measurement.from_dict(record[name]) for name in MEASUREMENTS
        )
        model = [
            short_form(record["architecture"]),
            record["digest"],
            f"{read(Workload, record['workload'])} {record['compile_unit']}",
            str(record["device"].get("date")),
        ]
        if not request.converged:
            model.append("not converged")
        table.add_row(
            "\n".join(model),
            *("\n".join(_three(times)) for times in (request, first_token, per_token)),
            _fraction(record),
        )
    return table


def rows_table(name: str, rows: dict[int, dict[str, Measurement]]) -> Table:
    """A latency table: what each operator adds to a prompt and to a step, in ms, by width."""
    table = Table(
        title=f"operators, ms per prompt and per step within a context: {name}",
        caption="±: half of the median's 95 % interval",
    )
    table.add_column("width", overflow="fold")
    widths = sorted(rows)
    for width in widths:
        table.add_column(str(width), justify="right")
    operators = dict.fromkeys(operator for width in widths for operator in rows[width])
    for operator in operators:
        cells = [rows[width].get(operator) for width in widths]
        table.add_row(operator, *("" if cell is None else _plus_minus(cell) for cell in cells))
    return table


def short_form(architecture: str) -> str:
    """An architecture's text with the short names of its operators.

    It is not parsed: operators of plugins that are not loaded keep their names.
    """
    head, _, tail = architecture.partition("|")
    names = [item.partition("(")[0] for item in tail.split()]
    short = [
        (OPERATORS[name].config_class.short_name or name) if name in OPERATORS else name
        for name in names
    ]
    return f"{head.strip()} | {' '.join(short)}"


def _three(times: Measurement) -> list[str]:
    return [f"{ms:.3f}" for ms in (times.median_ms, times.low_ms, times.high_ms)]


def _plus_minus(times: Measurement) -> str:
    return f"{times.median_ms:.3f} ±{(times.high_ms - times.low_ms) / 2:.3f}"


def _fraction(record: dict[str, Any]) -> str:
    """How close to the device's peaks decoding is; empty if the record does not say."""
    roofline = record.get("roofline")
    fraction = roofline.get("fraction") if isinstance(roofline, dict) else None
    return f"{fraction:.0%}" if isinstance(fraction, float) else ""


@entry_point("show", check)
def main(config: DictConfig) -> None:
    """Print what every device's folder holds."""
    cache_dir = check(config).cache_dir
    # Names and texts out of files: none of them is markup.
    console = Console(markup=False, highlight=False, emoji=False)
    found = measured_devices(cache_dir)
    if not found:
        print(f"error: {cache_dir}: nothing has been measured yet", file=sys.stderr)
        sys.exit(EXIT_NOTHING_MEASURED)
    for each in found:
        print_measured(each, console)


if __name__ == "__main__":
    main()
