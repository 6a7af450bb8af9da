import json
from dataclasses import replace

import pytest
import torch

import latency.device
from latency.device import USUAL_CACHE_BYTES, Device


def test_key_changes_with_the_thread_count():
    one, two = (Device.current(threads=n, kind="cpu") for n in (1, 2))
    assert one.key != two.key
    assert one.key == Device.current(threads=1, kind="cpu").key


@pytest.mark.parametrize(
    "field",
    [
        "model",
        "limit",
        "driver",
        "cache_bytes",
        "torch_version",
        "triton_version",
        "fla_version",
        "kernel_hash",
        "backend",
    ],
)
def test_key_changes_with_each_part_of_the_identity(device, field):
    assert replace(device, **{field: "other"}).key != device.key


@pytest.mark.parametrize("field", ["uuid", "date", "commit"])
def test_key_does_not_depend_on_what_is_only_recorded(device, field):
    assert replace(device, **{field: "other"}).key == device.key


def test_the_second_cache_is_found_among_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(latency.device, "CPU_CACHES", tmp_path)
    assert Device.current(kind="cpu").cache_bytes == USUAL_CACHE_BYTES
    caches = [("1", "48K"), ("1", "64K"), ("3", "491520K"), ("2", "512K")]
    for number, (level, size) in enumerate(caches):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert Device.current(kind="cpu").cache_bytes == 512 * 1024


def test_key_is_safe_in_file_names(device):
    assert set(device.key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_description_is_json_and_complete(device):
    described = json.loads(json.dumps(device.describe()))
    assert described["key"] == device.key
    assert described["torch_version"] == torch.__version__
    assert described["threads"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'cuda' is asked for"):
        Device.current(kind="cuda")


def test_thread_count_below_one_is_refused():
    with pytest.raises(ValueError, match="threads: must be >= 1, got 0"):
        Device.current(threads=0)
