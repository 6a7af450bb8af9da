"""What `python -m latency` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from latency.profile import Profile
from latency.roofline import Roofline
from latency.table import LatencyTable
from latency.timer import Measurement
from slm.architecture import Architecture

# CPUs busy with other work that are worth a remark.
BUSY_REMARK = 0.1


def profile_table(measured: Profile, roofline: Roofline) -> Table:
    """The figures of a whole model, with their intervals, beside what bounds them."""
    device, workload = measured.device, measured.workload
    table = Table(
        title=f"{workload} on {device.model}, {device.limit}, compiled: {measured.compile_unit}, "
        f"{measured.method}",
        caption="intervals: 95 % of the median" + _remarks(measured, roofline),
    )
    for column in ("", "median", "95 % interval", "n"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, times in (
        ("request, ms", measured.request_ms),
        ("time to first token, ms", measured.ttft_ms),
        ("time per output token, ms", measured.tpot_ms),
        ("reference of as many bytes, ms", measured.reference_ms),
    ):
        table.add_row(name, f"{times.median_ms:.3f}", _interval(times), str(times.n))
    median, low, high = measured.tokens_per_s
    table.add_row("tokens per second", f"{median:.1f}", f"{low:.1f} – {high:.1f}", "")
    step_s = measured.tpot_ms.median_ms / 1000
    table.add_row("tokens per second, decoding", f"{workload.batch_size / step_s:.1f}", "", "")
    name = f"share of the {roofline.bound} roofline, {roofline.bound_ms:.3f} ms"
    table.add_row(name, f"{roofline.fraction:.0%}", "", "")
    table.add_row("drift of the reference, %", f"{measured.drift_percent:+.1f}", "", "")
    table.add_row("parameters", f"{measured.parameters:,}", "", "")
    table.add_row("state, bytes", f"{measured.state_bytes:,}", "", "")
    if measured.peak_memory_bytes is not None:
        table.add_row("peak memory, bytes", f"{measured.peak_memory_bytes:,}", "", "")
    return table


def breakdown_table(latency_table: LatencyTable, architecture: Architecture) -> Table:
    """What each part of a model costs in a request, and what they add up to."""
    predicted = latency_table.predict(architecture)
    table = Table(
        title=f"from the latency table, compiled: {latency_table.compile_unit}",
        caption="base: what no operator adds; kind: what each kind of operator adds once; "
        "all at the machine speed of the model above",
    )
    for column in ("", "count", "each, ms", "95 % interval", "together, ms", "share"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, count, row in latency_table.terms(architecture):
        together = count * row.median_ms
        share = f"{together / predicted.request_ms:.0%}"
        each = f"{row.median_ms:.3f}"
        table.add_row(name, str(count), each, _interval(row), f"{together:.3f}", share)
    interval = f"{predicted.low_ms:.3f} – {predicted.high_ms:.3f}"
    table.add_row("sum", "", "", interval, f"{predicted.request_ms:.3f}", "")
    return table


def request_line(record: dict[str, Any]) -> str:
    """The request of a record that was kept."""
    times = Measurement.from_dict(record["request_ms"])
    return f"request {times.median_ms:.3f} ms, {_interval(times)}"


def _interval(times: Measurement) -> str:
    return f"{times.low_ms:.3f} – {times.high_ms:.3f}"


def _remarks(measured: Profile, roofline: Roofline) -> str:
    """What a reader must know before believing the figures."""
    remarks = ""
    if roofline.fraction > 1:
        remarks += "; above 100 % of the roofline: weights stay in a cache"
    if not measured.request_ms.converged:
        remarks += f"; wider than ±{measured.protocol.max_interval_percent:g} % when time was up"
    if not measured.request_ms.quiet:
        remarks += "; other work took the CPU meanwhile: too high"
    elif measured.other_cpus_busy > BUSY_REMARK:
        remarks += f"; {measured.other_cpus_busy:.1f} CPUs were busy with other work"
    return remarks
