import json
import logging
import math
import re
from dataclasses import asdict

import pytest
import torch

from latency.roofline import Peaks, Probe, measure_peaks, roofline, step_bytes, step_flops
from latency.workload import Workload
from slm.architecture import Architecture
from slm.model import LanguageModel
from slm.operators import OPERATORS

SMALL = Probe(buffer_bytes=2**20, matrix_sizes=(16, 32), max_seconds=1e-6)
PEAKS = Peaks(
    read_bytes_per_s=1e9, flops_per_s={"float32": 1e9, "bfloat16": 4e9}, other_cpus_busy=0.0
)


def bytes_of(text: str, context: int = 5, **workload) -> int:
    settings = {"prompt_tokens": 1, "new_tokens": 2} | workload
    return step_bytes(Architecture.parse(text), Workload(**settings), context)


# Width 8, 32 rows of the embedding, which is the head: with the last norm 264 values. A layer's
# norm has 8.
OUTSIDE = 32 * 8 + 8
ATTENTION = 8 + 4 * 8 * 8


@pytest.mark.parametrize(
    ("operator", "weights", "state_bytes"),
    [
        # Hidden width 24; nothing is remembered.
        ("ffn(multiple_of=1)", 8 + 3 * 8 * 24, 0),
        # Keys and values of 5 tokens pass once.
        ("attention(head_dim=4)", ATTENTION, 2 * 8 * 5 * 4),
        # Two query heads share a head of keys and values.
        ("attention(head_dim=4,query_groups=2)", 8 + 3 * 8 * 8, 2 * 4 * 5 * 4),
        # A window shows 3 tokens, and 1 more that is pinned.
        ("attention(head_dim=4,window=3)", ATTENTION, 2 * 8 * 3 * 4),
        ("attention(head_dim=4,window=3,pinned_tokens=1)", ATTENTION, 2 * 8 * 4 * 4),
        # Projections of q, k, v and the output, beta of two heads, three convolutions over 4
        # inputs, the norm of a head. Two heads of 4 × 4 and a tail of 3 × 24, read and written.
        ("deltanet(head_dim=4)", 8 + 4 * 64 + 16 + 3 * 8 * 4 + 4, 2 * 4 * (2 * 16 + 3 * 24)),
        # Inner width 16, four heads of 4, state size 2, 20 channels: in_proj to gate, channels
        # and step sizes; convolution with bias; A, D, dt; norm; out_proj. Four heads of 2 × 4 and
        # a tail of 3 × 20, read and written.
        (
            "mamba2(head_dim=4,state_size=2)",
            8 + 8 * (16 + 20 + 4) + 5 * 20 + 3 * 4 + 16 + 16 * 8,
            2 * 4 * (4 * 8 + 3 * 20),
        ),
    ],
)
def test_bytes_of_a_step_counted_by_hand(operator, weights, state_bytes):
    text = f"width=8 vocab_size=32 | {operator}"
    assert bytes_of(text) == 4 * (OUTSIDE + weights) + state_bytes
    # The weights are read once for all rows, the state for each.
    assert bytes_of(text, batch_size=3) == 4 * (OUTSIDE + weights) + 3 * state_bytes


def test_bytes_outside_of_the_operators():
    layer = 8 + 4 * 8 * 8
    cache = 2 * 8 * 5

    def text(options: str) -> str:
        return f"width=8 vocab_size=32 {options} | attention(head_dim=4)"

    tied = 4 * (32 * 8 + 8 + layer)
    assert bytes_of(text("")) == tied + 4 * cache
    # Not tied: the head, and of the embedding the rows of the batch.
    assert bytes_of(text("tie_embeddings=False")) == tied + 4 * (8 + cache)
    assert bytes_of(text("tie_embeddings=False"), batch_size=3) == tied + 3 * 4 * (8 + cache)
    # Meta tokens are in the state, and counted in the context.
    assert bytes_of(text("meta_tokens=2")) == bytes_of(text(""))
    # The norms of the head's rows.
    assert bytes_of(text("normalize_logits=True")) == tied + 4 * (32 + cache)


def test_bfloat16_halves_all_but_recurrent_states():
    text = "width=8 vocab_size=32 | {}"
    attention = text.format("attention(head_dim=4)")
    assert 2 * bytes_of(attention, dtype="bfloat16") == bytes_of(attention)
    deltanet = text.format("deltanet(head_dim=4)")
    recurrent_bytes = 2 * 4 * 2 * 16
    half = (bytes_of(deltanet) - recurrent_bytes) // 2
    assert bytes_of(deltanet, dtype="bfloat16") == half + recurrent_bytes


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_bytes_are_those_of_the_model(name):
    """Weights and state as a model holds them, for every operator there is."""
    fields = OPERATORS[name].config_class.__dataclass_fields__
    operator = f"{name}(head_dim=16)" if "head_dim" in fields else name
    architecture = Architecture.parse(f"width=32 vocab_size=64 meta_tokens=2 | {operator}")
    workload = Workload(batch_size=2, prompt_tokens=4, new_tokens=2)
    model = LanguageModel(architecture)
    context = 2 + 5
    weight_bytes = sum(p.nbytes for name, p in model.named_parameters() if name != "meta_tokens")
    buffers = [b for state in model.init_state(2, 5).operators for b in state.tensors()]
    # Integers are places, not contents.
    state_bytes = sum(b.nbytes for b in buffers if b.is_floating_point())
    passes = 1 if name == "attention" else 2
    assert step_bytes(architecture, workload, context) == weight_bytes + passes * state_bytes


def test_flops_are_of_the_whole_batch(architecture):
    workload = Workload(batch_size=3, prompt_tokens=4, new_tokens=5)
    assert step_flops(architecture, workload, 7) == 3 * architecture.flops_per_token(7)


@pytest.mark.parametrize(
    ("batch_size", "bound"), [(1, "memory"), (2, "memory"), (4, "compute"), (8, "compute")]
)
def test_the_slower_peak_bounds_a_step(architecture, batch_size, bound):
    # 2 FLOPs per weight and row: about as fast as reading its 4 bytes at 2 rows.
    workload = Workload(batch_size=batch_size, prompt_tokens=4, new_tokens=5)
    found = roofline(architecture, workload, 6, 0.5, PEAKS)
    assert found.bytes == step_bytes(architecture, workload, 6)
    assert found.flops == step_flops(architecture, workload, 6)
    assert found.bound == bound
    needed = {"memory": found.bytes, "compute": found.flops}
    assert found.bound_ms == pytest.approx(needed[bound] / 1e9 * 1000)
    assert found.bound_ms == pytest.approx(max(needed.values()) / 1e9 * 1000)
    assert found.fraction == pytest.approx(found.bound_ms / 0.5)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict() == asdict(found)


def test_compute_is_bound_by_the_peak_of_its_dtype(architecture):
    workload = Workload(batch_size=64, prompt_tokens=4, new_tokens=5, dtype="bfloat16")
    found = roofline(architecture, workload, 6, 1.0, PEAKS)
    assert found.bound == "compute"
    assert found.bound_ms == pytest.approx(found.flops / 4e9 * 1000)


def test_a_step_out_of_the_caches_may_be_above_the_roofline(architecture, workload):
    assert roofline(architecture, workload, 6, 1e-6, PEAKS).fraction > 1


def test_what_is_no_step_is_refused(architecture, workload):
    for time_ms in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tpot_ms: must be > 0"):
            roofline(architecture, workload, 6, time_ms, PEAKS)
    with pytest.raises(ValueError, match="context: must be >= 1, got 0"):
        roofline(architecture, workload, 0, 1.0, PEAKS)


def test_peaks_are_measured_once(device, tmp_path):
    announced: list[str] = []
    state = torch.random.get_rng_state()
    first = Peaks.load_or_measure(device, tmp_path, announced.append, SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.read_bytes_per_s > 0
    assert set(first.flops_per_s) == {"float32", "bfloat16"}
    assert all(0 < rate < math.inf for rate in first.flops_per_s.values())
    kept = json.loads(Peaks.path(device, tmp_path).read_text())
    assert kept["device"]["uuid"] == device.uuid
    assert kept["probe"]["matrix_sizes"] == [16, 32]
    # Equal to the last digit, and announced once: they were read.
    assert Peaks.load_or_measure(device, tmp_path, announced.append, SMALL) == first
    assert len(announced) == 1


def test_a_matrix_for_which_there_is_no_time_is_left_out(device):
    # Its matrices alone would take 3 TiB.
    huge = Probe(buffer_bytes=2**20, matrix_sizes=(16, 2**19), max_seconds=1e-6)
    assert measure_peaks(device, huge).flops_per_s["float32"] > 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", "Unterminated|Expecting|delimiter"),
        ("empty", "Expecting value"),
        ("foreign", "device.key: expected"),
        ("no dtype", "flops_per_s: expected"),
        ("zero", "read_bytes_per_s: must be > 0"),
        ("not a number", "flops_per_s.float32: must be > 0"),
        ("idle", "other_cpus_busy: must be >= 0"),
        ("a list", "no peaks"),
    ],
)
def test_a_bad_file_is_named_kept_aside_and_measured_anew(device, tmp_path, caplog, damage, reason):
    Peaks.load_or_measure(device, tmp_path, probe=SMALL)
    path = Peaks.path(device, tmp_path)
    content = json.loads(path.read_text())
    if damage == "foreign":
        content["device"]["key"] = "other"
    elif damage == "no dtype":
        del content["flops_per_s"]["bfloat16"]
    elif damage == "zero":
        content["read_bytes_per_s"] = 0.0
    elif damage == "not a number":
        content["flops_per_s"]["float32"] = math.nan
    elif damage == "idle":
        content["other_cpus_busy"] = -1.0
    elif damage == "a list":
        content = [content]
    text = json.dumps(content)
    damaged = {"truncated": text[: len(text) // 2], "empty": ""}.get(damage, text)
    path.write_text(damaged)
    with caplog.at_level(logging.WARNING):
        again = Peaks.load_or_measure(device, tmp_path, probe=SMALL)
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: ")
    assert re.search(reason, warning)
    assert path.with_name("peaks.json.bad").read_text() == damaged
    assert Peaks.from_dict(json.loads(path.read_text()), device.key) == again


def test_measuring_leaves_threads_as_they_were(device):
    torch.set_num_threads(2)
    measure_peaks(device, SMALL)
    assert torch.get_num_threads() == 2


def test_devices_have_buffers_that_no_cache_holds(device):
    assert Probe.for_device(device).buffer_bytes >= 512 * 2**20
