import shutil

import pytest
from programs import run_program

from latency.profile import profile
from latency.records import Records
from latency.roofline import Peaks, Probe
from latency.show import measured_devices, short_form
from latency.table import LatencyTable
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.operators import parse_operator


def run(folder, *arguments):
    arguments = ["-m", "latency.show", *arguments]
    return run_program(*arguments, folder=folder, environment={"COLUMNS": "100"})


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, module_device):
    """What `cache` is a copy of; measured once."""
    cache_dir = tmp_path_factory.mktemp("measured") / "cache"
    measure(cache_dir, module_device)
    return cache_dir


@pytest.fixture
def cache(tmp_path, measured):
    """A folder with `cache` in it, which holds peaks, a profile and a table."""
    return shutil.copytree(measured, tmp_path / "here" / "cache")


def measure(cache_dir, device):
    workload = Workload(prompt_tokens=4, new_tokens=5)
    architecture = Architecture.parse("width=16 vocab_size=32 | attention(head_dim=8) ffn ffn")
    protocol = Protocol(max_seconds=1e-6, max_rounds=6, warmup_rounds=1)
    probe = Probe(buffer_bytes=2**20, matrix_sizes=(16,), max_seconds=1e-6)
    Peaks.load_or_measure(device, cache_dir, probe=probe)
    record = profile(architecture, workload, device, protocol).to_dict()
    record["roofline"] = {"fraction": 0.4321}
    record["request_ms"]["converged"] = False
    Records(cache_dir, device).write(record)
    rows = [(parse_operator("attention(head_dim=8)"), 16), (parse_operator("ffn"), 32)]
    LatencyTable.load_or_build(rows, 32, workload, device, cache_dir=cache_dir, protocol=protocol)


def test_it_prints_every_figure_and_changes_nothing(cache, device, architecture, workload):
    before = contents(cache.parent)
    done = run(cache.parent)
    assert done.returncode == 0, done.stderr
    assert contents(cache.parent) == before
    shown = " ".join(done.stdout.split())
    assert device.key in shown
    assert device.model in shown
    peaks = Peaks.load_or_measure(device, cache)
    assert f"{peaks.read_bytes_per_s / 1e9:.1f} GB/s read" in shown
    for dtype, rate in peaks.flops_per_s.items():
        assert f"{rate / 1e9:.1f} GFLOP/s {dtype}" in shown
    record = Records(cache, device).read(architecture, workload, "eager")
    assert record is not None
    assert "width=16 vocab_size=32 | A F F" in shown
    assert architecture.digest in shown
    assert str(workload) in shown
    assert "eager" in shown
    assert "43%" in shown
    assert record["device"]["date"] in shown
    assert "not converged" in shown
    table = LatencyTable.load_or_build([], 32, workload, device, cache_dir=cache)
    assert set(table.rows) == {16, 32}
    assert table.path(cache).stem in shown
    for name in ("request_ms", "ttft_ms", "tpot_ms"):
        for end in ("median_ms", "low_ms", "high_ms"):
            assert f" {record[name][end]:.3f} " in shown
    for rows in table.rows.values():
        for row in rows.values():
            half_width = (row.high_ms - row.low_ms) / 2
            assert f" {row.median_ms:.3f} ±{half_width:.3f} " in shown
    assert "attention(head_dim=8)" in shown


PLACES = ("peaks.json", "profiles/*/*.json", "b1-*.json")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("damage", ["truncated", "foreign", "a list", "not text"])
def test_a_bad_file_is_skipped_and_the_rest_is_read(cache, device, place, damage):
    (path,) = (cache / "latency" / device.key).glob(place)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "foreign": content.replace(device.key.encode(), b"other"),
            "a list": b"[" + content + b"]",
            "not text": b"\xff" + content,
        }[damage]
    )
    (found,) = measured_devices(cache)
    (line,) = found.skipped
    assert line.startswith(f"{path}: skipped: ")
    assert (found.peaks is None) == (place == PLACES[0])
    assert (found.records == []) == (place == PLACES[1])
    assert (found.tables == {}) == (place == PLACES[2])
    assert found.device["key"] == device.key


def test_bad_files_are_named_in_one_line_and_left_where_they_are(cache, device):
    paths = [path for place in PLACES for path in (cache / "latency" / device.key).glob(place)]
    for path in paths:
        path.write_text(path.read_text()[:40])
    before = contents(cache.parent)
    done = run(cache.parent)
    assert done.returncode == 0, done.stderr
    assert contents(cache.parent) == before
    lines = [line for line in done.stdout.splitlines() if "skipped" in line]
    starts = [f"{path.relative_to(cache.parent)}: skipped: " for path in paths]
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_texts_out_of_files_are_not_markup(cache, device, architecture, workload):
    records = Records(cache, device)
    record = records.read(architecture, workload, "eager")
    assert record is not None
    records.write({**record, "architecture": "width=16 vocab_size=32 | strange[/x](a=[1])"})
    done = run(cache.parent)
    assert done.returncode == 0, done.stderr
    assert "strange[/x]" in done.stdout


def test_another_folder_is_shown_on_demand(cache, device, tmp_path):
    done = run(tmp_path, f"cache_dir={cache}")
    assert done.returncode == 0, done.stderr
    assert device.key in done.stdout


@pytest.mark.parametrize("kind", ["missing", "empty", "without files"])
def test_nothing_measured_is_one_line_and_exit_code_1(tmp_path, kind):
    if kind != "missing":
        (tmp_path / "cache").mkdir()
    if kind == "without files":
        (tmp_path / "cache/latency/some-device").mkdir(parents=True)
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: cache: nothing has been measured yet\n"


def test_a_mistake_in_the_command_is_named_and_exit_code_2(tmp_path):
    done = run(tmp_path, "cach_dir=elsewhere")
    assert done.returncode == 2
    assert "error: cach_dir" in done.stderr
    assert "did you mean 'cache_dir'" in done.stderr
    assert run(tmp_path, "--nonsense").returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_short_names_stand_for_operators_and_unknown_ones_stay():
    text = "width=16 vocab_size=32 meta_tokens=4 | attention(head_dim=8) mamba2 mine(a=1) ffn"
    assert short_form(text) == "width=16 vocab_size=32 meta_tokens=4 | A M2 mine F"
