"""Comes before the code of a stranger, who has torch and transformers and what these require.

For `python -I -c`. First, no other package can be found. Then, once torch and transformers have
loaded and run a model of their own, nothing more can be imported but the standard library and the
code of an export.
"""

import re
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from importlib.abc import MetaPathFinder


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names: Iterable[str]) -> set[str]:
    """These distributions, and all that they require without extras."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = canonical(pending.pop())
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            # Of another platform, or of another Python.
            continue
        pending += [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
    return found


class Refuse(MetaPathFinder):
    """Finds nothing but the standard library, the packages that are there, and the export."""

    def __init__(self) -> None:
        self.known = {name.partition(".")[0] for name, module in sys.modules.items() if module}
        self.known |= sys.stdlib_module_names | {"transformers_modules"}

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] not in self.known:
            raise ModuleNotFoundError(f"refused: {name}", name=name)


needed = required(["torch", "transformers"])
for package, distributions in metadata.packages_distributions().items():
    if package not in sys.modules and not needed & set(map(canonical, distributions)):
        sys.modules[package] = None
sys.modules.update(slm=None, latency=None, search=None)

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
)


def load_a_model_of_transformers(tokenizer_file: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_file=tokenizer_file).save_pretrained(folder)
        AutoConfig.from_pretrained(folder)
        tokens = AutoTokenizer.from_pretrained(folder)("to be", return_tensors="pt")
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generate(tokens["input_ids"], max_new_tokens=2, do_sample=True)


load_a_model_of_transformers(sys.argv[1])
sys.meta_path.insert(0, Refuse())
