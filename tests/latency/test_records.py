import copy
import json
import logging
from dataclasses import replace

import pytest

from latency.profile import profile
from latency.records import Records
from slm.architecture import Architecture


@pytest.fixture
def records(device, tmp_path) -> Records:
    return Records(tmp_path / "cache", device)


@pytest.fixture(scope="module")
def measured(module_device, workload, architecture, protocol) -> dict:
    return profile(architecture, workload, module_device, protocol).to_dict()


@pytest.fixture
def record(measured) -> dict:
    return copy.deepcopy(measured)


def test_a_record_is_read_back_as_it_was_written(records, record, architecture, workload):
    assert records.read(architecture, workload, "eager") is None
    record["roofline"] = {"fraction": 0.25}
    path = records.write(record)
    assert path == (
        records.cache_dir
        / "latency"
        / records.device.key
        / "profiles"
        / "b1-p4-n5-float32"
        / f"{architecture.digest}-eager.json"
    )
    assert records.read(architecture, workload, "eager") == record


def test_only_what_was_measured_is_found(records, record, architecture, workload):
    records.write(record)
    other = Architecture.parse("width=16 vocab_size=32 | ffn")
    assert records.read(other, workload, "eager") is None
    assert records.read(architecture, replace(workload, batch_size=2), "eager") is None
    assert records.read(architecture, workload, "step") is None
    elsewhere = replace(records, device=replace(records.device, limit="9 threads"))
    assert elsewhere.read(architecture, workload, "eager") is None


def test_measuring_again_keeps_the_record_before(records, record, architecture, workload):
    first = {**record, "seed": 1}
    path = records.write(first)
    records.write(record)
    assert records.read(architecture, workload, "eager") == record
    assert json.loads(path.with_name(path.name + ".previous").read_text()) == first
    # As if the second write had been cut off between its two steps.
    path.unlink()
    assert records.read(architecture, workload, "eager") == first


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", "line"),
        ("empty", "Expecting value"),
        ("a list", "no record"),
        ({"device": {"key": "other"}}, "device.key: expected"),
        ({"architecture": "width=16 vocab_size=32 | ffn"}, "architecture: expected 'width=16"),
        ({"architecture": None}, "architecture: expected its text"),
        ({"compile_unit": "step"}, "compile_unit: expected 'eager', got 'step'"),
        ({"workload": "b1-p4-n5-float32"}, "workload: expected its fields"),
        (
            {"workload": {"batch_size": 0, "prompt_tokens": 4, "new_tokens": 1}},
            "workload.batch_size: must be >= 1, got 0; workload.new_tokens: must be >= 2, got 1",
        ),
        (
            {"workload": {"batch_size": 9, "prompt_tokens": 4, "new_tokens": 5}},
            "workload: expected 'b1-p4-n5-float32', got 'b9-p4-n5-float32'",
        ),
        ({"request_ms": {"median_ms": 1.0}}, "request_ms: measurement: expected"),
        ({"tpot_ms": None}, "tpot_ms: measurement: expected"),
    ],
    ids=str,
)
def test_a_bad_file_is_named_and_kept_aside(
    records, record, architecture, workload, caplog, damage, reason
):
    path = records.write(record)
    text = json.dumps(record)
    if damage == "truncated":
        text = text[: len(text) // 2]
    elif damage == "empty":
        text = ""
    elif damage == "a list":
        text = json.dumps([record])
    else:
        text = json.dumps(record | damage)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert records.read(architecture, workload, "eager") is None
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: ")
    assert reason in warning
    assert path.with_name(path.name + ".bad").read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": {"key": "other"}}, "device.key: expected"),
        ({"request_ms": None}, "request_ms: measurement"),
        ({"compile_unit": "../eager"}, "compile_unit: expected a name, got '../eager'"),
        ({"digest": ""}, "digest: expected a name, got ''"),
    ],
)
def test_what_is_no_record_of_the_device_is_not_written(records, record, change, message):
    with pytest.raises(ValueError, match=message):
        records.write(record | change)
    assert not records.folder.exists()
