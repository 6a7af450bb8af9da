"""The latency table: what each operator costs inside a model, measured once per device.

    latency(architecture) ≈ base(width) + Σ row(operator, width)

A row is the difference between two requests run by the Decoder, interleaved: of a model with
COPIES more of the operator than an anchor model, and of the anchor, divided by COPIES. The base is
what is left of the anchor without its one operator: embedding, last norm, head, the choice of a
token, the loop.

A fixed reference request runs in every round. Costs are divided by its time in the same round and
multiplied by its time when the table was begun, so that rows measured while the machine was not
equally fast (drift, busy neighbours) fit together.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from latency.device import Device
from latency.lock import device_lock
from latency.profile import profile
from latency.request import Request, decoding, reference_decoding, reference_request
from latency.table_error import TableError, table_error
from latency.table_file import read_table, write_table
from latency.timer import (
    CpuMeter,
    Measurement,
    Protocol,
    Samples,
    measure_interleaved,
    quiet,
    weighted_sum,
)
from latency.workload import Workload
from slm.architecture import Architecture
from slm.compile_ahead import Decoding, compile_ahead
from slm.decoding_step import CompileUnit
from slm.operators import FFNConfig, OperatorConfig

log = logging.getLogger(__name__)

COPIES = 4
# Cheap and possible at every width; a model needs an operator.
ANCHOR = FFNConfig(ratio=1.0, multiple_of=1)
BASE = "base"
REFERENCE = "reference"

Row = tuple[OperatorConfig, int]  # operator, width
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a request, with the 95 % interval that the rows' noise leaves.

    The interval does not hold the error of adding up; `LatencyTable.validate` measures that.
    """

    request_ms: float
    low_ms: float
    high_ms: float


@dataclass
class LatencyTable:
    """Rows for one workload on one device, for models that are alike outside of their operators.

    vocab_size, meta_tokens, normalize_logits: as in the architectures that it is asked about.
    compile_unit: of the decoder that it is measured with.
    rows: by width, then by the operator's text; `BASE` names the rest of the model.
    reference_ms: time of the reference request at the machine speed at which the rows hold; None
        while there are no rows.
    """

    workload: Workload
    device: Device
    vocab_size: int
    meta_tokens: int = 0
    normalize_logits: bool = False
    compile_unit: CompileUnit = "eager"
    rows: dict[int, dict[str, Measurement]] = field(default_factory=dict)
    reference_ms: float | None = None

    @classmethod
    def load_or_build(
        cls,
        operators: Iterable[Row],
        vocab_size: int,
        workload: Workload,
        device: Device,
        *,
        meta_tokens: int = 0,
        normalize_logits: bool = False,
        cache_dir: Path = Path("cache"),
        protocol: Protocol | None = None,
        progress: Progress | None = None,
    ) -> LatencyTable:
        """The table of this device, with rows for `operators`; measures those that are missing.

        It is kept under `cache_dir`/latency/<device key>/. `protocol.max_seconds` holds for each
        operator. `progress` is told what is about to be measured. Raises ValueError if an operator
        cannot be built at its width, or if whole steps are to be compiled.
        """
        protocol = protocol or Protocol()
        unit = protocol.compile_unit
        if unit == "step":
            raise ValueError("compile_unit: a table takes 'operator' or 'eager', got 'step'")
        table = cls(workload, device, vocab_size, meta_tokens, normalize_logits, unit)
        path = table.path(cache_dir)
        wanted = list(operators)
        table = read_table(path, table.parse) or table
        if not table.missing(wanted):
            return table
        with device_lock(name=device.lock_name):
            # Another process may have measured them while this one waited for the device.
            table = read_table(path, table.parse) or table
            compile_ahead(table._decodings(table.missing(wanted)), progress)
            for width, missing in table.missing(wanted).items():
                meter = CpuMeter()
                if progress:
                    progress(f"latency of {len(missing)} operators at width {width}")
                rows = table._measure(width, missing, protocol)
                if not all(row.quiet for row in rows.values()):
                    busy = meter.others_busy()
                    log.warning("%s: width %d: other work kept %.1f CPUs busy", path, width, busy)
                table.rows.setdefault(width, {}).update(rows)
                write_table(path, table.to_dict())
        return table

    def path(self, cache_dir: Path) -> Path:
        """Where the table is kept."""
        parts = [str(self.workload), f"v{self.vocab_size}", f"m{self.meta_tokens}"]
        if self.normalize_logits:
            parts.append("normalized")
        parts.append(self.compile_unit)
        return cache_dir / "latency" / self.device.key / f"{'-'.join(parts)}.json"

    def missing(self, operators: Iterable[Row]) -> dict[int, list[OperatorConfig]]:
        """What of `operators` has no row, by width."""
        found: dict[int, list[OperatorConfig]] = {}
        for operator, width in dict.fromkeys(operators):
            if str(operator) not in self.rows.get(width, {}):
                found.setdefault(width, []).append(operator)
        return found

    def terms(self, architecture: Architecture) -> list[tuple[str, int, Measurement]]:
        """Name, count and cost of everything in a model: the base first, then its operators.

        Raises ValueError if the table is not for such a model or a row is missing.
        """
        for name in ("vocab_size", "meta_tokens", "normalize_logits"):
            asked, known = getattr(architecture, name), getattr(self, name)
            if asked != known:
                raise ValueError(f"{name}: the latency table holds for {known}, got {asked}")
        rows = self.rows.get(architecture.width, {})
        counts = {BASE: 1, **Counter(map(str, architecture.operators))}
        absent = [name for name in counts if name not in rows]
        if absent:
            raise ValueError(
                f"no row in the latency table at width {architecture.width} for "
                f"{', '.join(absent)}; there are: {', '.join(rows) or 'none'}"
            )
        return [(name, count, rows[name]) for name, count in counts.items()]

    def predict(self, architecture: Architecture) -> Prediction:
        """The request's latency as base + Σ rows. Raises ValueError if a row is missing."""
        total = weighted_sum((count, row) for _, count, row in self.terms(architecture))
        return Prediction(total.median_ms, total.low_ms, total.high_ms)

    def validate(
        self,
        architectures: Iterable[Architecture],
        protocol: Protocol | None = None,
        progress: Progress | None = None,
    ) -> TableError:
        """Measure whole models and compare; their operators need rows.

        Times are brought to the table's machine speed by the reference that runs beside both.
        """
        chosen = list(architectures)
        predicted = [self.predict(architecture).request_ms for architecture in chosen]
        assert self.reference_ms is not None
        measured, raw = [], []
        for number, architecture in enumerate(chosen, start=1):
            if progress:
                progress(f"whole model {number} of {len(chosen)}: {architecture}")
            whole = profile(architecture, self.workload, self.device, protocol)
            measured.append(whole.request_per_reference * self.reference_ms)
            raw.append(whole.request_ms.median_ms)
        return table_error([str(each) for each in chosen], predicted, measured, raw)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_or_build` keeps."""
        return {
            "workload": str(self.workload),
            "device": self.device.describe(),
            "vocab_size": self.vocab_size,
            "meta_tokens": self.meta_tokens,
            "normalize_logits": self.normalize_logits,
            "compile_unit": self.compile_unit,
            "reference_ms": self.reference_ms,
            "rows": {
                str(width): {name: row.to_dict() for name, row in rows.items()}
                for width, rows in self.rows.items()
            },
        }

    def parse(self, values: Any) -> LatencyTable:
        """This table with the rows that `to_dict` gave. Raises ValueError if it gave another's."""
        if not isinstance(values, dict) or not isinstance(values.get("rows"), dict):
            raise ValueError("no rows")
        mine = self.to_dict()
        for name in ("workload", "vocab_size", "meta_tokens", "normalize_logits", "compile_unit"):
            if values.get(name) != mine[name]:
                raise ValueError(f"{name}: expected {mine[name]!r}, got {values.get(name)!r}")
        key = values["device"].get("key") if isinstance(values.get("device"), dict) else None
        if key != self.device.key:
            raise ValueError(f"device.key: expected {self.device.key!r}, got {key!r}")
        reference_ms = values.get("reference_ms")
        if not isinstance(reference_ms, float) or not 0 < reference_ms < math.inf:
            raise ValueError(f"reference_ms: must be > 0, got {reference_ms!r}")
        rows: dict[int, dict[str, Measurement]] = {}
        for width, measured in values["rows"].items():
            if not isinstance(measured, dict) or BASE not in measured:
                raise ValueError(f"rows.{width}: no base")
            rows[int(width)] = {name: Measurement.from_dict(m) for name, m in measured.items()}
        return replace(self, rows=rows, reference_ms=reference_ms)

    def _measure(
        self, width: int, operators: list[OperatorConfig], protocol: Protocol
    ) -> dict[str, Measurement]:
        """Rows of `operators` at one width, all interleaved; the base too if it has none yet."""
        names = {str(operator): operator for operator in operators}
        needs_base = BASE not in self.rows.get(width, {})
        if needs_base:
            names[str(ANCHOR)] = ANCHOR
        requests = {
            name: self._request(width, operator, COPIES) for name, operator in names.items()
        }
        requests[BASE] = self._request(width, ANCHOR, 0)

        def costs(samples: Samples) -> dict[str, np.ndarray]:
            slowness = samples[REFERENCE] / (self.reference_ms or np.median(samples[REFERENCE]))
            anchor = samples[BASE]
            found = {name: (samples[name] - anchor) / COPIES for name in names}
            if needs_base:
                found[BASE] = anchor - found[str(ANCHOR)]
            return {name: cost / slowness for name, cost in found.items()}

        with quiet(self.device):
            slowest_ms = max(request.estimate_ms() for request in requests.values())
        is_whole = slowest_ms <= 1000 * protocol.max_request_seconds
        phases = {
            name: request.whole() if is_whole else request.sampled(protocol.num_contexts)
            for name, request in requests.items()
        }
        num_phases, reference = len(phases[BASE]), reference_request(self.device, self.compile_unit)
        share = replace(protocol, max_seconds=protocol.max_seconds * len(requests) / num_phases)
        terms: dict[str, list[tuple[float, Measurement]]] = {}
        for number in range(num_phases):
            current = {name: parts[number] for name, parts in phases.items()}
            timing = measure_interleaved(
                {REFERENCE: reference.run, **{name: each.run for name, each in current.items()}},
                self.device,
                share,
                prepare={
                    REFERENCE: reference.run,
                    **{name: phase.prepare for name, phase in current.items()},
                },
                derive=costs,
            )
            self.reference_ms = self.reference_ms or float(np.median(timing.samples[REFERENCE]))
            for name, measurement in timing.measurements.items():
                terms.setdefault(name, []).append((current[BASE].weight, measurement))
        return {name: weighted_sum(parts) for name, parts in terms.items()}

    def _decodings(self, missing: Mapping[int, list[OperatorConfig]]) -> Iterator[Decoding]:
        """What is decoded to measure the operators."""
        yield reference_decoding(self.device, self.compile_unit)
        for width, operators in missing.items():
            for operator in operators:
                architecture = self._architecture(width, operator, copies=1)
                yield decoding(architecture, self.workload, self.device, self.compile_unit)

    def _request(self, width: int, operator: OperatorConfig, copies: int) -> Request:
        """A request of the anchor model with `copies` of an operator added."""
        architecture = self._architecture(width, operator, copies)
        return Request(architecture, self.workload, self.device, self.compile_unit)

    def _architecture(self, width: int, operator: OperatorConfig, copies: int) -> Architecture:
        """The anchor model with `copies` of an operator added."""
        return Architecture(
            width=width,
            vocab_size=self.vocab_size,
            meta_tokens=self.meta_tokens,
            normalize_logits=self.normalize_logits,
            operators=(ANCHOR, *[operator] * copies),
        )
