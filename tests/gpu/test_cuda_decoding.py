"""Captured steps and the decoding attention on CUDA."""

import pytest
import torch
from attention_oracle import attention_of_places
from numerics import relative_rms

from latency.device import Device
from latency.profile import profile
from latency.roofline import Peaks
from latency.timer import Protocol
from latency.workload import Workload
from slm.architecture import Architecture
from slm.generation import Decoder
from slm.kernels.triton.decode_attention import decode_attention
from slm.model import LanguageModel

pytestmark = pytest.mark.gpu

OPERATORS = (
    "attention(head_dim=16,query_groups=2)",
    "attention(head_dim=16,window=7,pinned_tokens=3)",
    "mamba(state_size=8)",
    "mamba2(head_dim=16,state_size=16)",
    "linear_attention(head_dim=16)",
    "gla(head_dim=32)",
    "deltanet(head_dim=16)",
    "gated_deltanet(head_dim=16)",
    "rwkv7(head_dim=16)",
    "kda(head_dim=16)",
    "short_convolution",
    "ffn",
)


@pytest.fixture
def model() -> LanguageModel:
    text = f"width=32 vocab_size=60 meta_tokens=3 | {' '.join(OPERATORS)}"
    model = LanguageModel(Architecture.parse(text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to("cuda")


@pytest.mark.parametrize("unit", ["operator", "step"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_captured_steps_equal_eager(model: LanguageModel, unit: str, batch_size: int) -> None:
    plain = Decoder(model, 160, batch_size)
    captured = Decoder(model, 160, batch_size, unit)
    lengths = None if batch_size == 1 else torch.tensor([4, 9, 1], device="cuda")
    for _ in range(2):  # The second request finds nothing of the first.
        prompt = torch.randint(60, (batch_size, 9), device="cuda")
        plain.prefill(prompt, lengths)
        captured.prefill(prompt, lengths)
        for _ in range(150):
            tokens = torch.randint(60, (batch_size,), device="cuda")
            assert relative_rms(captured.step(tokens), plain.step(tokens)) < 1e-4


def test_no_token_waits_for_the_device(model: LanguageModel) -> None:
    decoder = Decoder(model, 160, 1, "step")
    tokens = torch.tensor([5], device="cuda")
    decoder.prefill(tokens[None])
    decoder.greedy_step(tokens)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profiled:
            for _ in range(50):
                tokens = decoder.greedy_step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts.get("cudaGraphLaunch") == 50
    # The profiler's own end waits once for the device.
    waits = {name: n for name, n in counts.items() if "Synchronize" in name}
    assert sum(waits.values()) <= 1, waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 32), (16, 4, 128), (12, 1, 64)])
def test_decode_attention(heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    places = 1000
    q = torch.randn(3, heads, size, dtype=dtype, device="cuda")
    k, v = torch.randn(2, places, 3, groups, size, dtype=dtype, device="cuda").transpose(1, 2)
    lengths = torch.tensor([1, 640, 1003], device="cuda")
    error = relative_rms(decode_attention(q, k, v, lengths), attention_of_places(q, k, v, lengths))
    assert error < (1e-5 if dtype == torch.float32 else 5e-3)


def test_roofline(tmp_path) -> None:
    """The paper's measurement, at a size that takes a minute; prints what it reached."""
    architecture = Architecture.parse(
        "width=2048 vocab_size=131072 | "
        "deltanet(head_dim=128) ffn mamba2(head_dim=64) ffn attention(head_dim=128) ffn"
    )
    workload = Workload(prompt_tokens=16, new_tokens=256, dtype="bfloat16")
    device = Device.current()
    measured = profile(architecture, workload, device, Protocol(compile_unit="step"))
    bound = measured.roofline(Peaks.load_or_measure(device, tmp_path))
    print(f"{device.model}: {bound.fraction:.0%} of the roofline")
    assert 0 < bound.fraction < 1
