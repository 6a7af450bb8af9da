import json
from dataclasses import replace

import pytest
import torch

from latency.profile import profile
from latency.request import Request
from latency.workload import Workload


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
    assert found.peak_memory_bytes is None
    record = json.loads(json.dumps(found.to_dict()))
    assert record["architecture"] == str(architecture)
    assert record["device"]["key"] == device.key
    assert record["request_ms"]["n"] == found.request_ms.n


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
    request.first_token()
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
