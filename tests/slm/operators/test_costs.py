"""What operators say they cost, against torch's own count and the algorithms as papers have them.

Torch counts the products of matrices and the convolutions. It does not see what is done element by
element, nor attention on a CPU; these cores are written down here, per token, from the recurrent
form of each paper: a state of S values decays with S operations, is read with 2 S (a product of a
vector and a matrix), and written with 2 S (an outer product that is added).
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slm.kernels.convolution import torch_causal_convolution
from slm.operators import OPERATORS, Sequence, parse_operator

WIDTH, CONTEXT, T = 64, 40, 40
DECAY, READ, WRITE = 1, 2, 2
KEYS = WIDTH * 16  # values of a state of heads of 16 by 16

CORES = {
    # Vaswani et al. 2017: scores and weighted sum, 2 · D each for every token seen.
    "attention(head_dim=16)": 4 * WIDTH * CONTEXT,
    "attention(head_dim=16,query_groups=2,window=9)": 4 * WIDTH * 9,
    "attention(head_dim=16,window=9,pinned_tokens=4)": 4 * WIDTH * (9 + 4),
    # Gu and Dao 2023, algorithm 2.
    "mamba(state_size=8)": (DECAY + WRITE + READ) * (2 * WIDTH) * 8,
    # Dao and Gu 2024, section 6.
    "mamba2(head_dim=16,state_size=8)": (DECAY + WRITE + READ) * (2 * WIDTH) * 8,
    # Katharopoulos et al. 2020, equations 18 to 20.
    "linear_attention(head_dim=16,feature_map=elu)": (WRITE + READ) * KEYS,
    # Yang et al. 2023, equation 3; keys of half the size of values.
    "gla(head_dim=16)": (DECAY + WRITE + READ) * KEYS // 2,
    # Yang et al. 2024: what is stored under the key is read first.
    "deltanet(head_dim=16)": (READ + WRITE + READ) * KEYS,
    # Yang, Kautz and Hatamizadeh 2024, equation 10; values of twice the size of keys.
    "gated_deltanet(head_dim=16)": (DECAY + READ + WRITE + READ) * KEYS * 2,
    # Kimi Team 2025, equation 1.
    "kda(head_dim=16)": (DECAY + READ + WRITE + READ) * KEYS,
    # Peng et al. 2025, equation 17: two outer products are added.
    "rwkv7(head_dim=16)": (DECAY + READ + 2 * WRITE + READ) * KEYS,
    "short_convolution": 0,
    "ffn": 0,
    "ffn(activation=relu2)": 0,
}


@pytest.mark.parametrize("text", CORES)
def test_matrices_and_convolutions_are_as_torch_counts_them(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ours is products element by element, of which torch counts none.
    monkeypatch.setattr(
        "slm.kernels.convolution.block_causal_convolution", torch_causal_convolution
    )
    config = parse_operator(text)
    operator = OPERATORS[config.name](config, WIDTH)
    with FlopCounterMode(display=False) as counter:
        operator.scan(torch.randn(1, T, WIDTH), Sequence(), None)
    # Products of batches of matrices are the core's.
    counted = ("aten.mm", "aten.addmm", "aten.convolution")
    flops = counter.get_flop_counts()["Global"]
    matrices = sum(count for name, count in flops.items() if str(name) in counted) / T
    assert matrices > 0
    assert config.flops_per_token(WIDTH, CONTEXT) - CORES[text] == pytest.approx(
        matrices, rel=1e-12
    )


def test_learned_feature_maps() -> None:
    # Two maps of 16 by 16 for the query and the key of each of four heads, on top of elu's cost.
    learned, elu = (
        parse_operator(f"linear_attention(head_dim=16{field})").flops_per_token(WIDTH, CONTEXT)
        for field in ("", ",feature_map=elu")
    )
    assert learned - elu == 2 * 2 * 4 * (2 * 16 * 16)


@pytest.mark.parametrize("text", CORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_as_large_as_what_is_allocated(text: str, dtype: torch.dtype) -> None:
    config = parse_operator(text)
    operator = OPERATORS[config.name](config, WIDTH).to(dtype)
    for context in (1, 8, 30):
        state = operator.init_state(3, context)
        # Of attention's bookkeeping, positions are no floating-point numbers.
        tensors = [tensor for tensor in state.tensors() if tensor.is_floating_point()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert config.state_bytes(WIDTH, context, dtype.itemsize) * 3 == size
