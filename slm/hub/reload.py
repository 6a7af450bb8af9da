"""Load an exported model as a stranger would, and report what it does.

Run as a script, in a process of its own: `python -I reload.py < request.json`. It must not import
anything of this project, and makes sure that nothing else does.

request: folder, tokens [[int]], prompt, new_tokens, threads, and the files to write: logits
(safetensors) and report, {"prompt_ids", "cached_equals_uncached", "sample"}.
"""

import json
import sys
from typing import Any

HIDDEN = ("slm", "latency", "search", "fla")


def main() -> None:
    """Read a request, write the logits and the report."""
    request = json.load(sys.stdin)
    # Importing any of these now raises ImportError.
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    # The tokenizer needs no code, but transformers reads the model's config first, and would ask.
    tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=True)
    model: Any = AutoModelForCausalLM.from_pretrained(request["folder"], trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.tensor(request["tokens"])).logits
    save_file({"logits": logits}, request["logits"])
    prompt = tokenizer(request["prompt"], return_tensors="pt")
    torch.manual_seed(0)
    sample = model.generate(
        **prompt, max_new_tokens=request["new_tokens"], do_sample=True, temperature=0.8, top_p=0.95
    )
    report = {
        "prompt_ids": prompt["input_ids"][0].tolist(),
        "cached_equals_uncached": _cached_equals_uncached(model, request["tokens"]),
        "sample": tokenizer.decode(sample[0], skip_special_tokens=True),
    }
    with open(request["report"], "w", encoding="utf-8") as file:
        json.dump(report, file)


def _cached_equals_uncached(model: Any, tokens: list[list[int]]) -> bool:
    """Greedy continuations of a batch padded on the left, with and without the cache."""
    import torch

    prompts = torch.tensor(tokens)
    mask = torch.ones_like(prompts)
    mask[0, : prompts.shape[1] // 3] = 0
    continuations = [
        model.generate(
            prompts, attention_mask=mask, max_new_tokens=16, do_sample=False, use_cache=use_cache
        )
        for use_cache in (True, False)
    ]
    return torch.equal(*continuations)


if __name__ == "__main__":
    main()
