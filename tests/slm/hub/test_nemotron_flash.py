"""NVIDIA's layout of Nemotron-Flash, against what the reference implementation gives."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from slm.architecture import Architecture
from slm.config import ConfigError, compose, read
from slm.generation import Decoder
from slm.hub import nemotron_flash
from slm.hub.loading import load_model
from slm.hub.weights import read_weights, write_weights
from slm.model import LanguageModel
from slm.model_config import ModelConfig
from tests.slm.hub.conftest import build_model

GOLDEN = Path(__file__).parent / "nemotron_flash"
VARIANTS = ["default_rope", "untied"]
# All that a layout can say, in one model.
OPERATORS = (
    "deltanet(head_dim=16) ffn(ratio=2.0,multiple_of=128) mamba2(head_dim=8,state_size=8) "
    "attention(head_dim=16,query_groups=2,qk_norm=True,rope_ntk=4.0) "
    "attention(head_dim=16,query_groups=2,qk_norm=True,rope_ntk=4.0,window=5)"
)
FIELDS = "meta_tokens=3 normalize_logits=True norm_eps=1e-06"


def error_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def write_folder(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def written(model: LanguageModel, folder: Path) -> Path:
    """The folder that holds `model` in their layout."""
    config = asdict(nemotron_flash.write_config(model.architecture))
    return write_folder(folder, config, nemotron_flash.write_model(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str) -> None:
    model, _ = load_model(GOLDEN / variant)
    golden = load_file(GOLDEN / variant / "logits.safetensors")
    numbers = [name.split(".")[1] for name in golden if name.startswith("logits.")]
    assert numbers
    for number in numbers:
        tokens, expected = golden[f"input_ids.{number}"], golden[f"logits.{number}"]
        with torch.no_grad():
            assert error_rms(model(tokens), expected) < 1e-5
        # And token by token.
        decoder = Decoder(model, tokens.shape[1], len(tokens))
        steps = [decoder.prefill(tokens[:, :1])]
        steps += [decoder.step(tokens[:, place]) for place in range(1, tokens.shape[1])]
        assert error_rms(torch.stack(steps, dim=1), expected) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_folder_comes_back_as_it_was(variant: str) -> None:
    model, _ = load_model(GOLDEN / variant)
    theirs = load_file(GOLDEN / variant / "model.safetensors")
    back = nemotron_flash.write_model(model)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    config = json.loads((GOLDEN / variant / "config.json").read_text())
    again = asdict(nemotron_flash.write_config(model.architecture, context_tokens=256))
    same = config.keys() - {
        # Of these nothing depends on them here: there is neither NTK scaling nor a window.
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
    assert {name: again[name] for name in same} == {name: config[name] for name in same}


@pytest.mark.parametrize("fields", [FIELDS, f"{FIELDS} tie_embeddings=False"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_model_comes_back_as_it_was(fields: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model(fields, OPERATORS, width=64)
    model = model.to(dtype)
    back, _ = load_model(written(model, tmp_path))
    assert back.architecture == model.architecture
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["nemotron_flash_1b", "nemotron_flash_3b"])
def test_released_models_are_expressed(name: str) -> None:
    config = compose("train", [f"model={name}"])[0]
    architecture = read(ModelConfig, config.model).architecture(131072)
    layout = asdict(nemotron_flash.write_config(architecture))
    assert nemotron_flash.read_config(layout).architecture() == architecture
    heads = {"nemotron_flash_1b": (16, 4), "nemotron_flash_3b": (24, 6)}[name]
    assert (layout["num_attention_heads"], layout["num_key_value_heads"]) == heads
    assert layout["mamba_d_state"] == 128
    assert layout["ffn_expand_ratio"] == 3.0


@pytest.mark.parametrize("width", [98, 300, 1100, 2049])
def test_networks_come_out_as_wide(width: int) -> None:
    for hidden in range(256, 4 * width, 128):
        # Rounded as ours is; as theirs is, this ratio would give another width.
        text = f"ffn(ratio={(hidden + 130) / width},multiple_of={hidden})"
        architecture = Architecture.parse(f"width={width} vocab_size=9 {FIELDS} | {text}")
        back = nemotron_flash.write_config(architecture).architecture()
        assert [each.hidden(width) for each in back.operators] == [hidden]


@pytest.mark.parametrize("rope", ["default", "ntk"])
@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_is_that_of_transformers(
    rope: str, norm: str, window: int | None, tmp_path: Path
) -> None:
    """NTK scaling, norms of q and k, and windows, of which the golden models have none.

    Qwen3 has them all, given the base that the formula of the reference comes to, and a window that
    counts the query's own key. Where q and k shall have no norm, its norms are taken out.
    """
    torch.manual_seed(0)
    head_dim, theta, longest, original = 16, 1000.0, 640, 256
    base = theta
    if rope == "ntk":
        base *= (2 * longest / original - 1) ** (head_dim / (head_dim - 2))
    layers = ["a", "f", "a", "f"]
    config = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": -1,
        "ffn_expand_ratio": 2,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "kq_norm": norm,
        "rope": True,
        "rope_type": rope,
        "rope_theta": theta,
        "max_position_embeddings": longest,
        "orig_max_position_embeddings": original,
        "sliding_window": window,
        "global_attn_idx": [2],
        "num_memory_tokens": 0,
    }
    oracle = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": base},
            use_sliding_window=window is not None,
            sliding_window=None if window is None else window + 1,
            layer_types=[
                "full_attention" if window is None else "sliding_attention",
                "full_attention",
            ],
            attn_implementation="eager",
        )
    ).eval()
    weights = {}
    for name, tensor in oracle.state_dict().items():
        tensor = tensor * (5 if tensor.dim() == 2 else 1) + 0.1 * torch.randn_like(tensor)
        oracle.state_dict()[name].copy_(tensor)
        weights[their_name(name)] = tensor
    if norm == "none":
        norms = ("q_norm.weight", "k_norm.weight")
        weights = {name: value for name, value in weights.items() if not name.endswith(norms)}
        for layer in oracle.model.layers:
            layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    model, _ = load_model(write_folder(tmp_path / "model", config, weights))
    tokens = torch.randint(50, (2, 23))
    with torch.no_grad():
        logits = oracle(tokens).logits / weights["lm_head.weight"].norm(dim=1)
        assert error_rms(model(tokens), logits) < 1e-5
        decoder = Decoder(model, 23, 2)
        decoder.prefill(tokens[:, :-1])
        assert error_rms(decoder.step(tokens[:, -1]), logits[:, -1]) < 1e-5


def their_name(name: str) -> str:
    """The name in the layout of a weight of Qwen3, whose layers are a mixer and a network."""
    parts = name.replace("model.norm.", "model.final_layernorm.").split(".")
    if parts[1] != "layers":
        return ".".join(parts)
    is_network = parts[3] in ("mlp", "post_attention_layernorm")
    parts[2] = str(2 * int(parts[2]) + is_network)
    renamed = {"mlp": "ffn", "post_attention_layernorm": "pre_ffn_layernorm"}
    return ".".join(renamed.get(part, part) for part in parts)


def test_weights_in_shards_are_read(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "untied" / "config.json", tmp_path)
    weights = load_file(GOLDEN / "untied" / "model.safetensors")
    half = len(weights) // 2
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, _ = load_model(GOLDEN / "untied")
    model, _ = load_model(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True)
    )


def test_large_weights_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.hub.weights.MAX_SHARD_SIZE", "100KB")
    weights = load_file(GOLDEN / "untied" / "model.safetensors")
    write_weights(weights, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    back = read_weights(tmp_path)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_all_bad_weights_are_named_at_once(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "untied" / "config.json").read_text())
    weights = load_file(GOLDEN / "untied" / "model.safetensors")
    del weights["model.layers.0.gla.k_proj.weight"], weights["model.final_layernorm.weight"]
    weights["model.layers.2.mamba.D"] = torch.ones(3)
    # A part that does not even go together with the others.
    weights["model.layers.0.gla.v_proj.weight"] = torch.ones(64, 32)
    weights["model.layers.4.self_attn.k_proj.weight"] = torch.ones(32, 32)
    weights["model.layers.9.extra"] = torch.ones(1)
    with pytest.raises(ConfigError) as error:
        load_model(write_folder(tmp_path / "bad", config, weights))
    assert [problem.partition("': ")[2] for problem in error.value.problems] == [
        "model.final_layernorm.weight: missing",
        "model.layers.0.gla.k_proj.weight: missing",
        "model.layers.0.gla.v_proj.weight: must be [64, 64], got [64, 32]",
        "model.layers.2.mamba.D: must be [8], got [3]",
        "model.layers.4.self_attn.k_proj.weight: must be [32, 64], got [32, 32]",
        "model.layers.9.extra: unknown",
    ]
    assert all(str(tmp_path / "bad") in problem for problem in error.value.problems)


def test_a_head_that_lost_its_tie_is_refused(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "default_rope" / "config.json").read_text())
    weights = load_file(GOLDEN / "default_rope" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    load_model(write_folder(tmp_path / "whole", config, weights))
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    with pytest.raises(ConfigError, match=r"lm_head\.weight: is tied"):
        load_model(write_folder(tmp_path / "lost", config, weights))


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        (
            {"rope": False, "kq_norm": None, "kq_head_dim": 8},
            ["kq_head_dim: must be -1, got 8", "rope: must be true", "kq_norm: must be 'none'"],
        ),
        ({"layer_types": ["a", "gdn"]}, ["layer_types[1]: must be "]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers: must be that of layer_types, 8, got 3"]),
        ({"rope_type": "dynamic_ntk"}, ["rope_type: "]),
        (
            {"rope_type": "ntk", "orig_max_position_embeddings": None},
            ["orig_max_position_embeddings: must be given"],
        ),
        ({"intermediate_size": 128}, ["intermediate_size: must be below 1"]),
        ({"ffn_expand_ratio": None}, ["ffn_expand_ratio: must be given"]),
        ({"hidden_size": "wide"}, ["hidden_size: "]),
        ({"num_attention_heads": 3}, ["num_attention_heads: must divide hidden_size 64, got 3"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads: must divide num_attention_heads 4"]),
        ({"mamba2_headdim": 48}, ["mamba2.head_dim: must divide"]),
    ],
)
def test_configs_that_cannot_be_had_are_refused(
    changes: dict[str, Any], problems: list[str], tmp_path: Path
) -> None:
    config = json.loads((GOLDEN / "untied" / "config.json").read_text())
    weights = load_file(GOLDEN / "untied" / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        load_model(write_folder(tmp_path / "bad", config | changes, weights))
    found = [problem.partition("': ")[2] for problem in error.value.problems]
    assert len(found) == len(problems)
    for problem, expected in zip(found, problems, strict=True):
        assert problem.removeprefix("does not hold a model: ").startswith(expected)


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            f"width=64 vocab_size=9 {FIELDS} | gla ffn",
            ["gla: is not among", "ffn.ratio: must make"],
        ),
        (
            "width=64 vocab_size=9 | attention(head_dim=16) attention(head_dim=32)",
            ["normalize_logits: must be True", "attention.head_dim: must be the same everywhere"],
        ),
        (
            f"width=64 vocab_size=9 {FIELDS} | attention(head_dim=16) deltanet(head_dim=32)",
            ["deltanet.head_dim: must be attention's"],
        ),
        (
            f"width=64 vocab_size=9 {FIELDS} | mamba2(head_dim=64)",
            ["mamba2.head_dim: must make the number of heads a multiple of 8, got 2 heads"],
        ),
        (
            f"width=64 vocab_size=9 {FIELDS} | deltanet(head_dim=16,conv_width=3) "
            "attention(head_dim=16,window=4,pinned_tokens=2) attention(head_dim=16,window=5)",
            [
                "deltanet.conv_width: must be 4, got 3",
                "attention.pinned_tokens: must be 0, got 2",
                "attention.window: must be None or one, got [4, 5]",
            ],
        ),
    ],
)
def test_what_the_layout_cannot_express_is_refused(text: str, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        nemotron_flash.write_config(Architecture.parse(text))
    assert len(error.value.problems) == len(problems)
    for problem, expected in zip(error.value.problems, problems, strict=True):
        assert problem.startswith(expected)
