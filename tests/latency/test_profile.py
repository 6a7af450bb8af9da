import json
import random
import time
from dataclasses import replace

import pytest
import torch

from latency.clock import CpuClock, Sample
from latency.profile import profile, profile_in_turn
from latency.reference import BETWEEN_RUNS_PERCENT, REQUESTS, SMALL
from latency.request import Request
from latency.roofline import Peaks, middle_context, step_bytes
from latency.timer import MIN_ROUNDS
from latency.workload import Workload
from slm.architecture import Architecture


def test_figures_belong_together(device, workload, architecture, protocol):
    found = profile(architecture, workload, device, protocol)
    assert (found.method, found.compile_unit) == ("whole", "eager")
    assert 0 < found.ttft_ms.median_ms < found.request_ms.median_ms
    assert found.tpot_ms.low_ms <= found.tpot_ms.median_ms <= found.tpot_ms.high_ms
    median, low, high = found.tokens_per_s
    assert low <= median <= high
    assert median == pytest.approx(1000 * workload.new_tokens / found.request_ms.median_ms)
    assert found.parameters == architecture.parameters()
    # Keys and values of 9 tokens, 16 wide, 4 bytes each.
    assert found.state_bytes == 2 * 9 * 16 * 4
    assert found.cache_state == "hot"
    low, high = found.request_per_reference_interval
    # However alike the rounds are, another run is not quite like this one.
    least = BETWEEN_RUNS_PERCENT / 100 * found.request_per_reference
    assert low + least <= found.request_per_reference <= high - least
    record = json.loads(json.dumps(found.to_dict()))
    assert record["architecture"] == str(architecture)
    assert record["device"]["key"] == device.key
    assert record["request_ms"]["n"] == found.request_ms.n


class CalmClock(CpuClock):
    """Runs what it times, and says how long that takes on a calm machine: 1 ms, within 1 %."""

    def __init__(self):
        self._random = random.Random(0)

    def time(self, function):
        function()
        return Sample(self._random.uniform(0.99, 1.01), is_quiet=True)


@pytest.fixture
def calm(monkeypatch):
    clock = CalmClock()
    monkeypatch.setattr("latency.timer.clock_of", lambda device: clock)


@pytest.mark.usefixtures("calm")
def test_a_model_that_is_quickly_made_is_measured_in_several_placements(
    device, workload, architecture, protocol
):
    assert profile(architecture, workload, device, protocol).placements == 1
    easy = replace(protocol, placements=4, max_seconds=1e3, max_interval_percent=1e6)
    begin_s = time.monotonic()
    found = profile(architecture, workload, device, easy)
    easy_seconds = time.monotonic() - begin_s
    assert found.placements == 4
    assert found.request_ms.n == found.placements * MIN_ROUNDS
    # There is time for several times as many, however busy the machine is.
    hard = replace(easy, max_seconds=4 * easy_seconds, max_interval_percent=1e-6)
    assert profile(architecture, workload, device, hard).placements > 4
    # There is no time for four.
    assert profile(architecture, workload, device, replace(easy, max_seconds=1e-3)).placements == 1


@pytest.mark.usefixtures("calm")
def test_models_are_measured_in_turn_until_each_is_known(
    device, workload, architecture, protocol, monkeypatch
):
    made, said = [], []

    class Noted(Request):
        def __init__(self, architecture, *arguments):
            made.append(architecture)
            super().__init__(architecture, *arguments)

    monkeypatch.setattr("latency.profile.Request", Noted)
    other = Architecture.parse("width=16 vocab_size=32 | ffn")
    easy = replace(protocol, placements=4, max_seconds=1e3, max_interval_percent=1e6)
    found = profile_in_turn([architecture, other], workload, device, easy, progress=said.append)
    assert [each.architecture for each in found] == [architecture, other]
    assert said == [f"whole model 1 of 2: {architecture}", f"whole model 2 of 2: {other}"]
    assert made == [architecture, other] * 4
    for each in found:
        assert each.placements == 4
        assert each.request_ms.n == each.placements * MIN_ROUNDS
    assert profile_in_turn([], workload, device, easy) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_holds_the_weights_once(device, workload, protocol, dtype):
    large = Architecture.parse("width=1024 vocab_size=1024 | ffn ffn ffn")
    workload = replace(workload, dtype=dtype)
    found = profile(large, workload, device, protocol)
    weights_bytes = workload.torch_dtype.itemsize * large.parameters()
    assert weights_bytes < found.peak_memory_bytes < 1.5 * weights_bytes


def test_what_was_compiled_is_in_the_record(device, workload, protocol):
    compiled = replace(protocol, compile_unit="operator", max_request_seconds=1e-9, num_contexts=2)
    # The references are compiled in any case.
    found = profile(REQUESTS[SMALL][0], workload, device, compiled)
    assert found.compile_unit == found.to_dict()["compile_unit"] == "operator"
    assert found.method == "sampled"


def test_roofline_is_at_the_middle_of_the_answer(device, workload, architecture, protocol):
    found = profile(architecture, workload, device, protocol)
    # Four prompt tokens; of the steps to the four other new ones, the middle sees seven or six.
    assert middle_context(architecture, workload) == 7
    peaks = Peaks(
        read_bytes_per_s=1e9,
        flops_per_s={"float32": 1e15, "bfloat16": 1e15},
        other_cpus_busy=0.0,
    )
    bound = found.roofline(peaks)
    assert bound.bytes == step_bytes(architecture, workload, 7)
    assert bound.fraction == pytest.approx(bound.bytes / 1e6 / found.tpot_ms.median_ms)


def test_sampled_request_is_the_sum_of_its_parts(device, workload, architecture, protocol):
    sampled = replace(protocol, max_request_seconds=1e-9, num_contexts=2)
    found = profile(architecture, workload, device, sampled)
    assert found.method == "sampled"
    steps = workload.new_tokens - 1
    expected = found.ttft_ms.median_ms + steps * found.tpot_ms.median_ms
    assert found.request_ms.median_ms == pytest.approx(expected)


@pytest.mark.parametrize(("prompt_tokens", "new_tokens", "contexts"), [(3, 5, 8), (10, 200, 3)])
def test_sampled_phases_stand_for_every_step_at_its_context(
    device, architecture, prompt_tokens, new_tokens, contexts
):
    workload = Workload(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    request = Request(architecture, workload, device)
    first, *decoding = request.sampled(contexts)
    assert first.weight == 1
    stood_for, bound = 0.0, prompt_tokens
    for phase in decoding:
        # More often than a stretch is long, so that it has to go back.
        for _ in range(20):
            phase.prepare()
            begin = request.decoder.num_tokens
            phase.run()
            burst = request.decoder.num_tokens - begin
            length = round(phase.weight * burst)
            assert bound <= begin
            assert request.decoder.num_tokens <= bound + length
        stood_for += length
        bound += length
    assert stood_for == new_tokens - 1


def test_a_request_reads_all_but_its_last_token(device, architecture):
    workload = Workload(batch_size=2, prompt_tokens=4, new_tokens=5)
    request = Request(architecture, workload, device)
    request.run()
    assert request.decoder.num_tokens == 4 + 5 - 1
    request.first_tokens()
    assert request.decoder.num_tokens == 4


def test_weights_and_prompt_follow_from_the_seed_alone(device, architecture, workload):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = Request(architecture, workload, device, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    two, other = (Request(architecture, workload, device, seed=seed) for seed in (3, 4))
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    weights = [r.decoder.model.layers[0].operator.o_proj.weight for r in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_bfloat16_is_what_runs(device, architecture, protocol):
    workload = Workload(prompt_tokens=4, new_tokens=3, dtype="bfloat16")
    request = Request(architecture, workload, device)
    assert {p.dtype for p in request.decoder.model.parameters()} == {torch.bfloat16}
    assert profile(architecture, workload, device, protocol).state_bytes == 2 * 7 * 16 * 2
