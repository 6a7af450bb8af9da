"""What many decoders need, compiled by other processes."""

import torch

from slm.architecture import Architecture
from slm.compile_ahead import Decoding, compile_ahead
from slm.decoding_step import is_compiled
from slm.generation import Decoder
from slm.model import LanguageModel

TEXTS = ("width=16 vocab_size=24 | ffn", "width=16 vocab_size=24 | ffn ffn(ratio=2.0)")


def decoding(text: str, **changes: object) -> Decoding:
    fields = {
        "max_tokens": 9,
        "batch_size": 2,
        "compile_unit": "operator",
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "threads": 1,
    }
    return Decoding(text, **{**fields, **changes})


def test_each_part_is_compiled_once_and_found_by_the_decoder() -> None:
    said: list[str] = []
    compile_ahead(map(decoding, TEXTS), said.append)
    # Two operators and the head.
    assert said == ["compiling 3 parts of models, once for this machine"]
    for text in TEXTS:
        model = LanguageModel(Architecture.parse(text)).eval()
        assert is_compiled(model, 9, 2, "operator")
        assert not is_compiled(model, 9, 1, "operator")
        prompt = torch.randint(24, (2, 4))
        expected = list(Decoder(model, 9, 2).generate(prompt, 5))
        actual = list(Decoder(model, 9, 2, "operator").generate(prompt, 5))
        assert all(map(torch.equal, actual, expected))
    compile_ahead(map(decoding, TEXTS), said.append)
    compile_ahead([decoding(TEXTS[0], compile_unit="eager")], said.append)
    assert len(said) == 1
