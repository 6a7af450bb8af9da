"""Load an exported model as a stranger would, and report what it does.

Run as a script, in a process of its own: `python -P reload.py < request.json`. It must not import
anything of this project, and makes sure that nothing else does.

request: folder, is_own (whether the model's code lies in it), tokens [[int]], prompt, new_tokens,
threads, and the files to write: logits (safetensors, fp32) and report, {"prompt_ids",
"cached_equals_uncached", "sample"}. The first and last are null where there is no tokenizer, the
second where the code is not ours.
"""

import json
import os
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
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    folder, is_own = request["folder"], request["is_own"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=is_own, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor(request["tokens"])).logits
    save_file({"logits": logits}, request["logits"])
    has_tokenizer = os.path.exists(os.path.join(folder, "tokenizer.json"))
    prompt_ids, sample = _generate(model, request) if has_tokenizer else (None, None)
    report = {
        "prompt_ids": prompt_ids,
        "cached_equals_uncached": _cached_equals_uncached(model, request["tokens"])
        if is_own
        else None,
        "sample": sample,
    }
    with open(request["report"], "w", encoding="utf-8") as file:
        json.dump(report, file)


def _generate(model: Any, request: dict[str, Any]) -> tuple[list[int], str]:
    """The prompt's tokens, and text that begins with it."""
    import torch
    from transformers import AutoTokenizer

    # The tokenizer needs no code, but transformers reads the model's config first, and would ask.
    tokenizer: Any = AutoTokenizer.from_pretrained(
        request["folder"], trust_remote_code=request["is_own"]
    )
    prompt = tokenizer(request["prompt"], return_tensors="pt")
    torch.manual_seed(0)
    sample = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=request["new_tokens"],
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    return prompt["input_ids"][0].tolist(), tokenizer.decode(sample[0], skip_special_tokens=True)


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
