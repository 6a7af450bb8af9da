"""One request of a workload, as the Decoder runs it, whole or taken apart into phases."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from latency.device import Device
from latency.timer import time_call
from latency.workload import Workload
from slm.architecture import Architecture
from slm.compile_ahead import Decoding
from slm.decoding_step import CompileUnit
from slm.generation import Decoder
from slm.model import LanguageModel
from slm.runtime import thread_count

# Steps that the estimate of a request's time rests on.
ESTIMATE_STEPS = 3
# Steps timed together, after one that is not: as in a whole request, they find the caches as a step
# left them, not as what ran interleaved did.
BURST_STEPS = 16


@dataclass(frozen=True)
class Phase:
    """A part of a request: it takes `weight` times what `run` takes.

    prepare: what has to have run, untimed, before each `run`.
    """

    weight: float
    run: Callable[[], object]
    prepare: Callable[[], object]


class Request:
    """A model with random weights, a prompt of random tokens, and the Decoder between them.

    What the weights are does not change what is computed; they and the prompt follow from `seed`.
    """

    def __init__(
        self,
        architecture: Architecture,
        workload: Workload,
        device: Device,
        compile_unit: CompileUnit = "eager",
        seed: int = 0,
    ) -> None:
        self.architecture, self.workload, self.device = architecture, workload, device
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator only: a caller's CUDA generators stay as they are.
            torch.default_generator.manual_seed(seed)
            model = LanguageModel(architecture)
            rows = (workload.batch_size, workload.max_tokens)
            tokens = torch.randint(architecture.vocab_size, rows)
        self.tokens = tokens.to(device.torch_device)  # [B, prompt + new]
        self.prompt = self.tokens[:, : workload.prompt_tokens]
        model = model.to(device.torch_device, workload.torch_dtype)
        with thread_count(device.threads):
            # What is compiled, is for so many threads.
            self.decoder = Decoder(
                model, workload.max_tokens, workload.batch_size, compile_unit=compile_unit
            )

    def run(self) -> None:
        """The whole request: prefill, then new_tokens − 1 steps, greedily."""
        for _ in self.decoder.generate(self.prompt, self.workload.new_tokens):
            pass

    def first_tokens(self, count: int = 1) -> None:
        """The request up to its first token, or `count` of them."""
        for _ in self.decoder.generate(self.prompt, count):
            pass

    def warm_up(self) -> None:
        """A first token and a step: what comes then finds the caches as this request left them.

        A prompt that comes right after is faster than one after the many steps of a request, by a
        tenth or by more: by what neighbours, meanwhile, took of a cache that cores share.
        """
        self.first_tokens(2)

    def steps(self, count: int) -> None:
        """Decoding steps, the choice of each next token included."""
        tokens = self.tokens[:, 0].contiguous()
        for _ in range(count):
            tokens = self.decoder.greedy_step(tokens)

    def estimate_ms(self) -> tuple[float, float]:
        """Roughly what the first token takes and what the steps after it do, a few of which run."""
        self.first_tokens()
        first_token_ms = time_call(self.first_tokens, self.device).ms
        steps = self.workload.new_tokens - 1
        times = [
            time_call(partial(self.steps, 1), self.device).ms
            for _ in range(min(ESTIMATE_STEPS, steps))
        ]
        return first_token_ms, steps * statistics.median(times)

    def sampled(self, num_contexts: int) -> list[Phase]:
        """The request as its first token and one phase for each of the contexts.

        The steps are cut into `num_contexts` stretches of equal length; a stretch takes the time
        of a burst of steps around its middle, times the bursts that it is long.
        """
        steps = self.workload.new_tokens - 1
        bounds = [steps * place // num_contexts for place in range(num_contexts + 1)]
        phases = [self.prompt_phase()]
        for begin, end in itertools.pairwise(bounds):
            if begin < end:
                burst = min(BURST_STEPS, end - begin)
                first = self.workload.prompt_tokens + (begin + end - burst) // 2
                step = self.step_phase(first, self.workload.prompt_tokens + end)
                phases.append(replace(step, weight=(end - begin) * step.weight))
        return phases

    def prompt_phase(self, new_tokens: int = 1) -> Phase:
        """The request up to its first token, or `new_tokens` of them."""
        return Phase(1.0, partial(self.first_tokens, new_tokens), self.warm_up)

    def step_phase(self, first: int, last: int) -> Phase:
        """One decoding step, timed in bursts that begin and end with `first` to `last` tokens read.

        Meta tokens are not counted.
        """
        burst = min(BURST_STEPS, last - first)
        hold = partial(self._hold, max(first - 1, 0), last - burst - 1)
        return Phase(1.0 / burst, partial(self.steps, burst), hold)

    def _hold(self, first: int, last: int) -> None:
        """See to it that between `first` and `last` tokens have been read, and one after them."""
        if not first <= self.decoder.num_tokens <= last:
            self.decoder.pretend(first)
        self.steps(1)


def decoding(
    architecture: Architecture, workload: Workload, device: Device, compile_unit: CompileUnit
) -> Decoding:
    """What a request of it decodes, to be compiled before."""
    return Decoding(
        str(architecture),
        workload.max_tokens,
        workload.batch_size,
        compile_unit,
        workload.torch_dtype,
        device.torch_device,
        device.threads,
    )
