"""The latency table: what each operator costs inside a model, measured once per device.

    latency(architecture) ≈ base(width) + kinds · kind(width) + Σ cost(operator, width)
    cost(operator, width) = row(prompt) + Σ steps · row(context)

A row holds what an operator adds to one part of a request, see `latency.grid`. The base is what no
operator adds: embedding, last norm, head, the choice of a token, the loop. Every kind of operator
in a model adds something of its own, however often it is there: its code, which is as cold at each
step as weights are. Rows are the least squares fit to models run by the Decoder, interleaved, in
which operators are mixed as in those that are asked about, see `latency.table_models`. One table
serves all workloads that are alike in batch and dtype, and measures only what one has that others
had not.

References run in every round, see `latency.reference`. Times are divided by theirs in the same
round and multiplied by theirs when the table was begun, so that rows measured while the machine was
not equally fast (drift, busy neighbours) fit together. All models of a width are made anew several
times, for where they lie in memory makes a percent or two.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from latency.device import Device
from latency.grid import (
    PROMPT_NEW_TOKENS,
    Part,
    contexts,
    most_tokens,
    operator_parts,
    parts,
    representative,
)
from latency.lock import device_lock
from latency.memory import available_bytes
from latency.placement import interleaved_round_ms, num_placements, share_of
from latency.profile import profile_in_turn
from latency.reference import (
    References,
    ReferenceTimes,
    measure_references,
    reference_decodings,
    reference_time,
)
from latency.request import Phase, Request, decoding
from latency.roofline import footprint_bytes
from latency.table_error import TableError, table_error
from latency.table_file import read_table, write_table
from latency.table_models import table_models
from latency.timer import (
    CpuMeter,
    Measurement,
    Protocol,
    Samples,
    measure_interleaved,
    weighted_sum,
)
from latency.workload import Workload
from slm.architecture import Architecture
from slm.compile_ahead import Decoding, compile_ahead
from slm.decoding_step import CompileUnit
from slm.operators import FFNConfig, OperatorConfig

log = logging.getLogger(__name__)

# Stands for mixers or FFNs where there are none: without a second kind of operator beside the
# first, one kind's own cost would be the base's. Cheap and possible at every width.
ANCHOR = FFNConfig(ratio=1.0, multiple_of=1)
BASE, KIND = "base", "kind"
# Of what memory there is, for the models that are measured together; one placement of them lies in
# memory while the next is made.
MEMORY_SHARE = 0.4

Row = tuple[OperatorConfig, int]  # operator, width
Timed = tuple[Architecture, Part]
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
    """Rows on one device for models that are alike outside of their operators.

    workload: what it is asked about; rows of others of its batch size and dtype may be there, too.
    vocab_size, meta_tokens, normalize_logits: as in the architectures that it is asked about.
    compile_unit: of the decoder that it is measured with.
    rows: by width, then by the operator's text and the part of a request, see `row_name`; `BASE`
        names the rest of the model, `KIND` what each kind of operator adds once.
    reference_times: of the references at the machine speed at which the rows hold; None while there
        are no rows.
    """

    workload: Workload
    device: Device
    vocab_size: int
    meta_tokens: int = 0
    normalize_logits: bool = False
    compile_unit: CompileUnit = "eager"
    rows: dict[int, dict[str, Measurement]] = field(default_factory=dict)
    reference_times: ReferenceTimes | None = None

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
        wanted = list(dict.fromkeys(operators))
        table = read_table(path, table.parse) or table
        if not table.missing(wanted):
            return table
        with device_lock(name=device.lock_name):
            # Another process may have measured them while this one waited for the device.
            table = read_table(path, table.parse) or table
            missing = table.missing(wanted)
            models = {
                width: table._models(width, new, [each for each, at in wanted if at == width])
                for width, new in missing.items()
            }
            compile_ahead(table._decodings(models), progress)
            table.reference_times = table.reference_times or measure_references(device, protocol)
            for width, new in missing.items():
                meter = CpuMeter()
                if progress:
                    progress(f"latency of {len(new)} operators at width {width}")
                # The rest of a model is measured as well.
                seconds = protocol.max_seconds * (1 + len(new))
                rows = table._measure(models[width], replace(protocol, max_seconds=seconds))
                if not all(row.quiet for row in rows.values()):
                    busy = meter.others_busy()
                    log.warning("%s: width %d: other work kept %.1f CPUs busy", path, width, busy)
                table.rows.setdefault(width, {}).update(rows)
                write_table(path, table.to_dict())
        return table

    def path(self, cache_dir: Path) -> Path:
        """Where the table is kept."""
        names = [self._kind_of_workload(), f"v{self.vocab_size}", f"m{self.meta_tokens}"]
        if self.normalize_logits:
            names.append("normalized")
        names.append(self.compile_unit)
        return cache_dir / "latency" / self.device.key / f"{'-'.join(names)}.json"

    def missing(self, operators: Iterable[Row]) -> dict[int, dict[OperatorConfig, list[Part]]]:
        """The parts of the workload for which `operators` have no row, by width and operator."""
        found: dict[int, dict[OperatorConfig, list[Part]]] = {}
        for operator, width in operators:
            rows = self.rows.get(width, {})
            parts = [
                part
                for part in self._parts(operator, width)
                if row_name(operator, part) not in rows
            ]
            if parts:
                found.setdefault(width, {})[operator] = parts
        return found

    def terms(self, architecture: Architecture) -> list[tuple[str, int, Measurement]]:
        """Name, count and cost of everything in a model: base and kinds first, then its operators.

        Raises ValueError if the table is not for such a model or a row is missing.
        """
        for name in ("vocab_size", "meta_tokens", "normalize_logits"):
            asked, known = getattr(architecture, name), getattr(self, name)
            if asked != known:
                raise ValueError(f"{name}: the latency table holds for {known}, got {asked}")
        width = architecture.width
        rows = self.rows.get(width, {})
        counts = Counter(architecture.operators)
        # As those of an operator that costs the same in all contexts.
        rest = self._parts(ANCHOR, width)
        wanted = {BASE: (1, rest), KIND: (len(counts), rest)} | {
            str(operator): (count, self._parts(operator, width))
            for operator, count in counts.items()
        }
        absent = [
            row_name(name, part)
            for name, (_, parts) in wanted.items()
            for part in parts
            if row_name(name, part) not in rows
        ]
        if absent:
            raise ValueError(
                f"no row in the latency table at width {width} for {'; '.join(absent)}; "
                f"there are: {'; '.join(rows) or 'none'}"
            )
        return [
            (
                name,
                count,
                weighted_sum((times, rows[row_name(name, part)]) for part, times in parts.items()),
            )
            for name, (count, parts) in wanted.items()
        ]

    def predict(self, architecture: Architecture) -> Prediction:
        """The request's latency as the sum of its rows. Raises ValueError if a row is missing."""
        total = weighted_sum((count, row) for _, count, row in self.terms(architecture))
        return Prediction(total.median_ms, total.low_ms, total.high_ms)

    def slower(self, factor: float) -> LatencyTable:
        """What it is while the machine takes `factor` times as long for everything."""
        assert self.reference_times is not None
        return replace(
            self,
            rows={
                width: {name: weighted_sum([(factor, row)]) for name, row in rows.items()}
                for width, rows in self.rows.items()
            },
            reference_times=self.reference_times.slower(factor),
        )

    def validate(
        self,
        architectures: Iterable[Architecture],
        protocol: Protocol | None = None,
        progress: Progress | None = None,
    ) -> TableError:
        """Measure whole models, in turn, and compare; their operators need rows.

        Times are brought to the table's machine speed by the references that run beside both.
        """
        chosen = list(architectures)
        predicted = [self.predict(architecture).request_ms for architecture in chosen]
        assert self.reference_times is not None
        found = profile_in_turn(chosen, self.workload, self.device, protocol, progress=progress)
        raw = [each.request_ms.median_ms for each in found]
        measured = [each.request_ms.median_ms * each.scale(self.reference_times) for each in found]
        return table_error([str(each) for each in chosen], predicted, measured, raw)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_or_build` keeps."""
        return {
            "workload": self._kind_of_workload(),
            "device": self.device.describe(),
            "vocab_size": self.vocab_size,
            "meta_tokens": self.meta_tokens,
            "normalize_logits": self.normalize_logits,
            "compile_unit": self.compile_unit,
            "reference_times": self.reference_times and self.reference_times.to_dict(),
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
        reference_times = ReferenceTimes.from_dict(values.get("reference_times"))
        rows: dict[int, dict[str, Measurement]] = {}
        for width, measured in values["rows"].items():
            if not isinstance(measured, dict) or not any(
                name.startswith(f"{BASE}, ") for name in measured
            ):
                raise ValueError(f"rows.{width}: no base")
            rows[int(width)] = {name: Measurement.from_dict(m) for name, m in measured.items()}
        return replace(self, rows=rows, reference_times=reference_times)

    def _models(
        self,
        width: int,
        missing: Collection[OperatorConfig],
        asked: Collection[OperatorConfig],
    ) -> list[Architecture]:
        """Those that are measured: of what is missing, beside what else is asked about.

        Mixers that are missing stand with FFNs that are, or with all that are asked about if none
        is missing, or with ANCHOR if there are none; and FFNs with mixers.
        """

        def choose(are_ffns: bool) -> list[OperatorConfig]:
            new, every = (
                [each for each in operators if isinstance(each, FFNConfig) == are_ffns]
                for operators in (missing, asked)
            )
            return new or every or [ANCHOR]

        def architecture(operators: tuple[OperatorConfig, ...]) -> Architecture:
            return Architecture(
                width=width,
                vocab_size=self.vocab_size,
                meta_tokens=self.meta_tokens,
                normalize_logits=self.normalize_logits,
                operators=operators,
            )

        usable_bytes = MEMORY_SHARE * available_bytes(self.device)

        def fits(models: list[tuple[OperatorConfig, ...]]) -> bool:
            return sum(self._bytes(architecture(each)) for each in models) <= usable_bytes

        chosen = table_models(choose(are_ffns=False), choose(are_ffns=True), fits)
        return [architecture(each) for each in chosen]

    def _bytes(self, architecture: Architecture) -> int:
        """Of its weights, and of its state at the end of a request."""
        itemsize = self.workload.torch_dtype.itemsize
        context = architecture.meta_tokens + self.workload.max_tokens
        state_bytes = architecture.state_bytes(context, itemsize)
        return itemsize * architecture.parameters() + self.workload.batch_size * state_bytes

    def _measure(self, models: list[Architecture], protocol: Protocol) -> dict[str, Measurement]:
        """The rows that are missing at one width, fitted to models that are timed in turn."""
        rows_there = self.rows.get(models[0].width, {})
        known = {name: row.median_ms for name, row in rows_there.items()}
        timed = {
            (model, part): rows
            for model in models
            for part, rows in self._distinct_parts(model).items()
            if not rows.keys() <= known.keys()
        }
        wanted = [
            *dict.fromkeys(name for rows in timed.values() for name in rows if name not in known)
        ]
        counts = np.array([[rows.get(name, 0) for name in wanted] for rows in timed.values()])
        known_ms = [
            sum(count * known.get(name, 0.0) for name, count in rows.items())
            for rows in timed.values()
        ]
        footprints = [footprint_bytes(model, self.workload) for model, _ in timed]

        def costs(samples: Samples) -> dict[str, np.ndarray]:
            """The rows that leave the least relative errors, round by round."""
            assert self.reference_times is not None
            ms = np.stack(
                [
                    samples[_timed_name(model, part)]
                    / part.burst
                    * self.reference_times.at(footprint)
                    / reference_time(samples, footprint, self.device.cache_bytes)
                    for (model, part), footprint in zip(timed, footprints, strict=True)
                ]
            )  # [timed, rounds]
            weights = 1 / np.median(ms, axis=1, keepdims=True)
            solution = np.linalg.pinv(weights * counts) @ (
                weights * (ms - np.array(known_ms)[:, None])
            )
            return dict(zip(wanted, solution, strict=True))

        placements = self._time(list(timed), costs, protocol)
        return {
            name: Measurement.from_placements(
                [each[name] for each in placements], protocol.max_interval_percent
            )
            for name in wanted
        }

    def _time(
        self,
        timed: list[Timed],
        costs: Callable[[Samples], Samples],
        protocol: Protocol,
    ) -> list[dict[str, Measurement]]:
        """Parts of models beside the references, in as many placements as there is time for."""
        found: list[dict[str, Measurement]] = []
        count = 1
        while len(found) < count:
            begin_s = time.monotonic()
            # The last placement lies in memory until this one does, which gets memory of its own.
            references = References(self.device, self.compile_unit)
            phases = self._phases(timed)
            functions = references.functions | {name: each.run for name, each in phases.items()}
            prepare = references.prepare | {name: each.prepare for name, each in phases.items()}
            if not found:
                seconds_to_make = time.monotonic() - begin_s
                round_ms = interleaved_round_ms(functions, prepare, self.device)
                count = num_placements(round_ms, seconds_to_make, protocol)
            timing = measure_interleaved(
                functions,
                self.device,
                share_of(protocol, count),
                prepare=prepare,
                derive=costs,
            )
            found.append(timing.measurements)
        return found

    def _phases(self, timed: Iterable[Timed]) -> dict[str, Phase]:
        """What is timed of each, by its name."""
        chosen: dict[Architecture, list[Part]] = {}
        for model, part in timed:
            chosen.setdefault(model, []).append(part)
        phases = {}
        for model, own in chosen.items():
            prompt = self.workload.prompt_tokens
            room = most_tokens(own, self.meta_tokens)
            workload = replace(self.workload, new_tokens=max(2, room - prompt))
            request = Request(model, workload, self.device, self.compile_unit)
            for part in own:
                phases[_timed_name(model, part)] = (
                    request.prompt_phase(PROMPT_NEW_TOKENS)
                    if part.kind == "prompt"
                    else request.step_phase(*part.steps(self.meta_tokens))
                )
        return phases

    def _distinct_parts(self, model: Architecture) -> dict[Part, dict[str, int]]:
        """The workload's parts that do not cost a model the same, each with the rows it is."""
        found: dict[Part, dict[str, int]] = {}
        for part in parts(self.workload, self.meta_tokens):
            rows = self._rows_of(model, part)
            if rows not in found.values():
                found[part] = rows
        return found

    def _rows_of(self, model: Architecture, part: Part) -> dict[str, int]:
        """The rows whose sum a part of a request is, and how often each is in it."""
        counts = Counter(model.operators)
        rest = part if part.kind == "prompt" else contexts(0, self.meta_tokens)[0]
        rows = {row_name(BASE, rest): 1, row_name(KIND, rest): len(counts)}
        for operator, count in counts.items():
            own = representative(operator, model.width, part, self.meta_tokens)
            rows[row_name(operator, own)] = count
        return rows

    def _parts(self, operator: OperatorConfig, width: int) -> dict[Part, float]:
        return operator_parts(operator, width, self.workload, self.meta_tokens)

    def _kind_of_workload(self) -> str:
        """What all workloads that share the table have in common: 'b1-float32'."""
        return f"b{self.workload.batch_size}-{self.workload.dtype}"

    def _decodings(self, models: Mapping[int, Iterable[Architecture]]) -> Iterator[Decoding]:
        """What is decoded to measure the operators, each of which is in one of the models alone."""
        yield from reference_decodings(self.device, self.compile_unit)
        for architecture in itertools.chain.from_iterable(models.values()):
            if len(architecture.operators) == 1:
                yield decoding(architecture, self.workload, self.device, self.compile_unit)


def row_name(operator: OperatorConfig | str, part: Part) -> str:
    """Of the row of an operator, or of `BASE` or `KIND`, for a part of a request."""
    return f"{operator}, {part}"


def _timed_name(model: Architecture, part: Part) -> str:
    return f"{model}, {part}"
