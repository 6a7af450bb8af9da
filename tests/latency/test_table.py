import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latency.clock import CpuClock, Sample
from latency.grid import Part
from latency.reference import REQUESTS, SMALL, ReferenceTimes
from latency.request import BURST_STEPS
from latency.table import ANCHOR, BASE, KIND, LatencyTable, row_name
from latency.table_error import spearman, table_error
from latency.timer import Measurement
from slm.architecture import Architecture
from slm.operators import parse_operator

ATTENTION = parse_operator("attention(head_dim=8)")
FFN = parse_operator("ffn")


def row(median: float, error: float = 0.0) -> Measurement:
    return Measurement(
        median_ms=median,
        low_ms=median - error,
        high_ms=median + error,
        iqr_ms=0.0,
        n=9,
        converged=True,
        quiet=True,
    )


TIMES = ReferenceTimes(dict.fromkeys(REQUESTS, 10.0), cache_bytes=2**20)
PROMPT, CONTEXT = Part("prompt", 4), Part("context", 64)
# The workload's: one prompt and the step after it, three others, all within the first context.
STEPS = 3


def names(*operators) -> set[str]:
    """Of the rows that the workload needs for each."""
    return {row_name(operator, part) for operator in operators for part in (PROMPT, CONTEXT)}


# What there is at every width, and what stands beside a kind that is alone.
REST, BESIDE_ONE = names(BASE, KIND), names(ANCHOR)


MAMBA2 = parse_operator("mamba2(head_dim=8)")
# Of a step; a prompt takes so many times that.
COSTS_MS = {BASE: 1.0, KIND: 0.25, ANCHOR: 0.5, FFN: 0.125, ATTENTION: 2.0, MAMBA2: 3.0}
PROMPT_STEPS = 10.0


class AddingClock(CpuClock):
    """Times models as if they were sums of such costs, on a machine that becomes ever slower."""

    def __init__(self):
        self.speed = 1.0

    def read(self):
        # Once for each round.
        self.speed *= 1.01

    def time(self, function):
        function()
        called = function.func if isinstance(function, partial) else function
        kind = called.__name__
        if kind == "run":  # of a reference, or of a whole round
            return Sample(self.speed, is_quiet=True)
        request = called.__self__
        operators = request.architecture.operators
        step_ms = sum(COSTS_MS[each] for each in (BASE, *[KIND] * len(set(operators)), *operators))
        times = BURST_STEPS if kind == "steps" else PROMPT_STEPS
        return Sample(times * step_ms * self.speed, is_quiet=True)


@pytest.fixture
def table(device, workload) -> LatencyTable:
    rows = {
        row_name(BASE, PROMPT): row(1.0, 0.8),
        row_name(BASE, CONTEXT): row(0.5),
        row_name(KIND, PROMPT): row(0.125),
        row_name(KIND, CONTEXT): row(0.0625),
        row_name(ATTENTION, PROMPT): row(0.5),
        row_name(ATTENTION, CONTEXT): row(0.75, 0.2),
        row_name(FFN, PROMPT): row(0.25),
        row_name(FFN, CONTEXT): row(0.125),
    }
    return LatencyTable(workload, device, vocab_size=32, rows={16: rows}, reference_times=TIMES)


@pytest.fixture
def build(device, workload, protocol, tmp_path):
    def load_or_build(*operators, **changes) -> LatencyTable:
        arguments = {"cache_dir": tmp_path / "cache", "protocol": protocol} | changes
        return LatencyTable.load_or_build(operators, 32, workload, device, **arguments)

    return load_or_build


def test_rows_of_compiled_operators_are_another_table(build, protocol, workload, device):
    """Compiled before by other processes."""
    said = []
    compiled = replace(protocol, compile_unit="operator")
    table = build((FFN, 64), protocol=compiled, progress=said.append)
    assert said[0].startswith("compiling ")
    assert set(table.rows[64]) == REST | BESIDE_ONE | names(FFN)
    assert table.to_dict()["compile_unit"] == "operator"
    plain = LatencyTable(workload, device, vocab_size=32)
    folder = Path()
    assert plain.path(folder) != table.path(folder)
    with pytest.raises(ValueError, match="compile_unit: expected 'eager', got 'operator'"):
        plain.parse(table.to_dict())


def test_whole_steps_have_no_parts(build, protocol):
    with pytest.raises(ValueError, match=r"compile_unit: a table takes .*, got 'step'"):
        build((FFN, 16), protocol=replace(protocol, compile_unit="step"))


def test_prediction_is_base_plus_rows(table):
    architecture = Architecture.parse("width=16 vocab_size=32 | attention(head_dim=8) ffn ffn ffn")
    prediction = table.predict(architecture)
    prompt = 1.0 + 2 * 0.125 + 0.5 + 3 * 0.25
    step = 0.5 + 2 * 0.0625 + 0.75 + 3 * 0.125
    assert prediction.request_ms == pytest.approx(prompt + STEPS * step)
    # Errors add as squares: 0.8² + (3 · 0.2)² = 1.
    assert prediction.low_ms == pytest.approx(prediction.request_ms - 1.0)
    assert prediction.high_ms == pytest.approx(prediction.request_ms + 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width=16 vocab_size=32 | mamba2(head_dim=8) ffn", r"no row .* width 16 for mamba2"),
        (
            "width=32 vocab_size=32 | ffn",
            r"no row .* width 32 for base, prompt 4; base, .*; kind, .*; kind, .*; ffn, prompt",
        ),
        ("width=16 vocab_size=33 | ffn", "vocab_size: the latency table holds for 32, got 33"),
        ("width=16 vocab_size=32 meta_tokens=4 | ffn", "meta_tokens: .* holds for 0, got 4"),
    ],
)
def test_a_model_that_the_table_does_not_know_is_refused(table, text, message):
    with pytest.raises(ValueError, match=message):
        table.predict(Architecture.parse(text))


def test_all_of_a_table_is_as_much_slower(table):
    architecture = Architecture.parse("width=16 vocab_size=32 | attention(head_dim=8) ffn")
    before, after = (each.predict(architecture) for each in (table, table.slower(3.0)))
    assert vars(after) == pytest.approx({name: 3 * ms for name, ms in vars(before).items()})
    assert table.slower(3.0).reference_times.ms == dict.fromkeys(REQUESTS, 30.0)


def test_a_measured_table_adds_up_and_is_read_back(build):
    built = build((ATTENTION, 16), (FFN, 16))
    assert set(built.rows[16]) == REST | names(ATTENTION, FFN)
    architecture = Architecture.parse("width=16 vocab_size=32 | ffn attention(head_dim=8) ffn")
    expected = sum(
        count * times * built.rows[16][row_name(operator, part)].median_ms
        for operator, count in Counter([BASE, KIND, KIND, FFN, ATTENTION, FFN]).items()
        for part, times in ((PROMPT, 1), (CONTEXT, STEPS))
    )
    assert built.predict(architecture).request_ms == pytest.approx(expected)
    assert build((ATTENTION, 16), (FFN, 16)).rows == built.rows


@pytest.mark.parametrize("memory_bytes", [10**9, 1])
def test_rows_are_the_costs_that_add_up_to_the_models_times(build, monkeypatch, memory_bytes):
    clock = AddingClock()
    monkeypatch.setattr("latency.table.available_bytes", lambda device: memory_bytes)
    monkeypatch.setattr("latency.timer.clock_of", lambda device: clock)
    # What comes later is fitted to what is known.
    for operators in ([(FFN, 16)], [(FFN, 16), (ATTENTION, 16), (MAMBA2, 16)]):
        table = build(*operators)
    scale = table.reference_times.ms[SMALL]
    for operator, step_ms in COSTS_MS.items():
        step, prompt = (table.rows[16][row_name(operator, part)] for part in (CONTEXT, PROMPT))
        assert step.median_ms == pytest.approx(step_ms * scale, rel=1e-6)
        assert prompt.median_ms == pytest.approx(PROMPT_STEPS * step_ms * scale, rel=1e-6)


def test_new_rows_are_added_without_measuring_old_ones_again(build):
    announced: list[str] = []
    first = build((FFN, 16), progress=announced.append)
    second = build((FFN, 16), (ATTENTION, 16), (FFN, 32), progress=announced.append)
    for name, measured in first.rows[16].items():
        assert second.rows[16][name] == measured
    # The rows hold for one machine speed, whenever they were measured.
    assert second.reference_times == first.reference_times
    assert set(second.rows[16]) - set(first.rows[16]) == names(ATTENTION)
    assert set(second.rows[32]) == REST | BESIDE_ONE | names(FFN)
    assert announced == [f"latency of 1 operators at width {width}" for width in (16, 16, 32)]
    # Nothing is missing: nothing is measured, so nothing is said.
    assert build((FFN, 32), progress=announced.append).rows == second.rows
    assert len(announced) == 3


@pytest.fixture(scope="module")
def built_twice(module_device, workload, protocol, tmp_path_factory) -> tuple[LatencyTable, Path]:
    """The first of two tables, and the `cache` that holds both."""
    cache_dir = tmp_path_factory.mktemp("built") / "cache"
    first, _ = (
        LatencyTable.load_or_build(
            rows, 32, workload, module_device, cache_dir=cache_dir, protocol=protocol
        )
        for rows in ([(FFN, 16)], [(FFN, 16), (ATTENTION, 16)])
    )
    return first, cache_dir


@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "no base", "no reference", "not a number", "empty"]
)
def test_a_bad_file_is_kept_aside_and_the_last_good_one_is_used(
    build, built_twice, tmp_path, caplog, damage
):
    first, cache_dir = built_twice
    shutil.copytree(cache_dir, tmp_path / "cache")
    path = first.path(tmp_path / "cache")
    content = json.loads(path.read_text())
    if damage == "foreign":
        content["workload"] = "b9-float32"
    elif damage == "no base":
        for part in (PROMPT, CONTEXT):
            del content["rows"]["16"][row_name(BASE, part)]
    elif damage == "no reference":
        content["reference_times"] = None
    elif damage == "not a number":
        content["rows"]["16"][row_name(BASE, PROMPT)]["median_ms"] = float("nan")
    text = json.dumps(content)
    damaged = {"truncated": text[: len(text) // 2], "empty": ""}.get(damage, text)
    path.write_text(damaged)
    with caplog.at_level(logging.WARNING):
        again = build((FFN, 16))
    assert again.rows == first.rows
    assert str(path) in caplog.text
    assert path.with_name(path.name + ".bad").read_text() == damaged


def test_two_bad_files_are_both_kept_and_the_table_is_measured_anew(build, tmp_path):
    path = build((FFN, 16)).path(tmp_path / "cache")
    for content in ("{", "[1]"):
        path.write_text(content)
        path.with_name(path.name + ".previous").unlink(missing_ok=True)
        assert names(FFN) <= set(build((FFN, 16)).rows[16])
    kept = [path.with_name(path.name + suffix).read_text() for suffix in (".bad", ".bad1")]
    assert kept == ["{", "[1]"]


def test_tables_of_different_devices_and_models_do_not_mix(table, tmp_path, device):
    others = [
        replace(table, device=replace(device, limit="9 threads")),
        replace(table, vocab_size=33),
        replace(table, meta_tokens=1),
        replace(table, normalize_logits=True),
        replace(table, workload=replace(table.workload, batch_size=2)),
        replace(table, workload=replace(table.workload, dtype="bfloat16")),
    ]
    assert len({each.path(tmp_path) for each in [table, *others]}) == 7


def test_workloads_share_rows(device, workload, protocol, tmp_path):
    """Measured is what one has that others had not: a prompt of another length, more context."""
    wanted, said = [(FFN, 16), (ATTENTION, 16)], []

    def build(**changes) -> LatencyTable:
        return LatencyTable.load_or_build(
            wanted,
            32,
            replace(workload, **changes),
            device,
            cache_dir=tmp_path,
            protocol=protocol,
            progress=said.append,
        )

    first = build()
    assert len(said) == 1
    # Of the same prompt, within the same context.
    assert build(new_tokens=60).rows == first.rows
    assert len(said) == 1
    # The base and what is recurrent cost the same in every context.
    longer = build(new_tokens=100)
    assert said[1:] == ["latency of 1 operators at width 16"]
    assert set(longer.rows[16]) - set(first.rows[16]) == {row_name(ATTENTION, Part("context", 128))}
    prompt = build(prompt_tokens=9)
    assert said[2:] == ["latency of 2 operators at width 16"]
    assert set(prompt.rows[16]) - set(longer.rows[16]) == {
        row_name(operator, Part("prompt", 9)) for operator in (BASE, KIND, FFN, ATTENTION)
    }
    for name, measured in longer.rows[16].items():
        assert prompt.rows[16][name] == measured
    assert prompt.reference_times == first.reference_times
    architecture = Architecture.parse("width=16 vocab_size=32 | ffn attention(head_dim=8)")
    predicted = [table.predict(architecture).request_ms for table in (first, build(new_tokens=60))]
    assert predicted[1] > predicted[0]


def test_an_operator_that_cannot_be_built_is_named(build):
    with pytest.raises(ValueError, match=r"attention\.head_dim: must divide the width 20"):
        build((ATTENTION, 20))


def test_validation_compares_with_whole_models(table, protocol):
    texts = ["width=16 vocab_size=32 | ffn", "width=16 vocab_size=32 | ffn attention(head_dim=8)"]
    error = table.validate(map(Architecture.parse, texts), protocol)
    assert error.architectures == texts
    assert error.predicted_ms == pytest.approx([1.375 + STEPS * 0.6875, 2.0 + STEPS * 1.5])
    signed = [(p / m - 1) * 100 for p, m in zip(error.predicted_ms, error.measured_ms, strict=True)]
    assert error.errors_percent == pytest.approx(signed)


def test_errors_of_known_figures():
    error = table_error(["a", "b", "c"], [11.0, 18.0, 30.0], [10.0, 20.0, 30.0], [1.0, 2.0, 3.0])
    assert error.errors_percent == pytest.approx([10.0, -10.0, 0.0])
    assert error.mape_percent == pytest.approx(20 / 3)
    assert error.max_error_percent == pytest.approx(10.0)
    assert error.spearman == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must not be empty"):
        table_error([], [], [], [])


def test_spearman_is_that_of_pandas():
    x, y = np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 7, 1, 8, 2, 8, 1, 8])
    expected = pd.DataFrame({"x": x, "y": y}).corr(method="spearman").loc["x", "y"]
    assert spearman(x, y) == pytest.approx(expected)
    assert spearman(x, np.ones(8)) is None
