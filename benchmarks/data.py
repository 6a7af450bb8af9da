"""How fast text becomes tokens on disk, and how much of a training step the loader takes.

Tokenizing is timed as `slm.data.prepare` does it, from text in shards on disk to token shards with
their checksums and indices on disk. Reading the text and learning the tokenizer come before and are
not timed. The text is Shakespeare's plays over and over, each scene numbered: no two documents are
the same, words are as frequent as ever.

The loader's share is the time that a loop waits for its next batch, of the time of all steps of a
small hybrid, forward, backward and optimizer. The loader runs in the process that trains, as
`train.py` has it.

python benchmarks/data.py
python benchmarks/data.py --megabytes 20 --steps 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

# The processes that encode import this file: what only training needs is imported where it is used.
from slm.data import DataConfig, PackedCorpus, TokenizerConfig, prepare
from slm.data.shakespeare import scenes

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 4096
OPERATORS = "attention(head_dim=32) ffn(ratio=2.0) mamba2(head_dim=32,state_size=32) ffn(ratio=2.0)"
WIDTH = 192
SEQUENCE_TOKENS = 512
BATCH_SIZE = 8
WARMUP_STEPS = 3


def main() -> None:
    import torch

    from latency.device import Device
    from latency.lock import device_lock

    arguments = parse_arguments()
    device = Device.current(threads=arguments.threads)
    torch.set_num_threads(device.threads)
    with tempfile.TemporaryDirectory() as folder, device_lock(exclusive=True):
        corpus, tokenizing_s = measure_tokenizing(Path(folder), arguments.megabytes)
        loading_s, step_s = measure_loading(corpus, device.torch_device, arguments.steps)
        megabytes = (corpus.train.num_bytes + corpus.validation.num_bytes) / 1e6
    results = {"tokenize_mb_per_s": megabytes / tokenizing_s, "loader_share": loading_s / step_s}
    print_results(megabytes, tokenizing_s, loading_s, step_s)
    environment = {
        **device.describe(),
        "megabytes": megabytes,
        "vocab_size": VOCAB_SIZE,
        "width": WIDTH,
        "operators": OPERATORS,
        "batch_size": BATCH_SIZE,
        "sequence_tokens": SEQUENCE_TOKENS,
        "steps": arguments.steps,
    }
    print(json.dumps({"benchmark": "data", "results": results, "environment": environment}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=134, help="of text; eight shards of it")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--threads", type=int, default=1, help="of training")
    return parser.parse_args()


def measure_tokenizing(folder: Path, megabytes: float) -> tuple[PackedCorpus, float]:
    """A corpus of so much text, and the seconds from its text in shards to its tokens."""
    text = folder / "text.jsonl"
    write_text(text, round(megabytes * 1e6))
    begun_s: list[float] = []

    def on_progress(message: str) -> None:
        if message.startswith("packing"):
            begun_s.append(time.perf_counter())

    data = DataConfig(source="text", files=(str(text),), cache_dir=folder)
    corpus = prepare(data, TokenizerConfig(vocab_size=VOCAB_SIZE), on_progress)
    return corpus, time.perf_counter() - begun_s[0]


def write_text(path: Path, num_bytes: int) -> None:
    """The plays over and over, up to a size, a numbered scene per line."""
    plays = list(scenes())
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            if file.tell() >= num_bytes:
                return
            scene = f"{number}\n\n{plays[number % len(plays)]}"
            file.write(json.dumps({"text": scene}, ensure_ascii=False) + "\n")


def measure_loading(
    corpus: PackedCorpus, device: torch.device, num_steps: int
) -> tuple[float, float]:
    """Median seconds of waiting for a batch, and of a whole step, the waiting included."""
    import torch

    from slm.architecture import Architecture
    from slm.data.datamodule import PackedDataModule
    from slm.model import LanguageModel
    from slm.training.loss import next_token_loss

    text = f"width={WIDTH} vocab_size={corpus.vocab_size} | {OPERATORS}"
    model = LanguageModel(Architecture.parse(text)).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    module = PackedDataModule(
        corpus, sequence_tokens=SEQUENCE_TOKENS, batch_size=BATCH_SIZE, num_workers=0
    )
    batches = islice(module.train_dataloader(), WARMUP_STEPS + num_steps)
    loading_s, step_s = [], []
    begin_s = time.perf_counter()
    for batch in batches:
        loaded_s = time.perf_counter()
        loss = next_token_loss(model, {name: each.to(device) for name, each in batch.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # Waits for the device.
        loss.item()
        end_s = time.perf_counter()
        loading_s.append(loaded_s - begin_s)
        step_s.append(end_s - begin_s)
        begin_s = end_s
    return (
        statistics.median(loading_s[WARMUP_STEPS:]),
        statistics.median(step_s[WARMUP_STEPS:]),
    )


def print_results(megabytes: float, tokenizing_s: float, loading_s: float, step_s: float) -> None:
    table = Table(title="data")
    for column in ("what", "how much", "per", "gives"):
        table.add_column(column, justify="right")
    rate = f"{megabytes / tokenizing_s:.2f} MB/s"
    table.add_row("tokenizing", f"{megabytes:.1f} MB", f"{tokenizing_s:.1f} s", rate)
    share = f"{100 * loading_s / step_s:.2f} %"
    table.add_row("loader", f"{1000 * loading_s:.2f} ms", f"step of {1000 * step_s:.0f} ms", share)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
