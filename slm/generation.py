"""The decoder: prefill a prompt, then one token at a time on static state.

It is what users run and what latency is measured with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slm.decoding_step import CompiledStep, CompileUnit, init_state
from slm.huge_pages import move_to_huge_pages
from slm.model import LanguageModel

# Prompts are read in pieces of so many tokens, which bounds the memory that it takes.
PREFILL_TOKENS = 4096


class Decoder:
    """Decodes batches of `batch_size` rows of up to `max_tokens` tokens, prompt included.

    compile_unit: what of a step is compiled as one; see `slm.decoding_step`. The first decoder of
        a model compiles it, for seconds per operator; it is found on disk from then on. Weights
        that are on the CPU are moved to huge pages.

    Raises CompilationError if something is to be compiled and there is no compiler.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        max_tokens: int,
        batch_size: int = 1,
        compile_unit: CompileUnit = "eager",
    ) -> None:
        self.model = model.eval()
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.compile_unit = compile_unit
        if compile_unit != "eager":
            move_to_huge_pages(model)
        self.num_meta = model.architecture.meta_tokens
        self.num_tokens = 0
        self.state = init_state(model, batch_size, max_tokens)
        self._compiled: CompiledStep | None = None
        if compile_unit != "eager":
            self._compiled = CompiledStep(model, self.state, batch_size, compile_unit)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Forget everything but the meta tokens, then read tokens [B, T]; logits [B, V].

        lengths: [B], real tokens of each row, at least one; what follows them is padding.
        """
        self._reserve(tokens.shape[1], used=0)
        self._begin()
        self.state.reset()
        last: Tensor | None = None
        for begin in range(0, tokens.shape[1], PREFILL_TOKENS):
            piece = tokens[:, begin : begin + PREFILL_TOKENS]
            if lengths is None:
                last = self.model.append(piece, self.state)[:, -1]
                continue
            place = lengths - 1 - begin
            hidden = self.model.append(piece, self.state, (place + 1).clamp(0, piece.shape[1]))
            rows = torch.arange(len(piece), device=piece.device)
            ends = hidden[rows, place.clamp(0, piece.shape[1] - 1)]
            last = ends if last is None else torch.where((place >= 0)[:, None], ends, last)
        assert last is not None
        return self.model.logits(last)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token [B] per row; logits [B, V]."""
        logits = self._step(tokens)[1]
        # On CUDA the next step writes where this one did.
        return logits.clone() if self._compiled is not None and logits.is_cuda else logits

    @torch.inference_mode()
    def greedy_step(self, tokens: Tensor) -> Tensor:
        """Read one token [B] per row; the likeliest next ones [B]."""
        return self._step(tokens)[0]

    @torch.inference_mode()
    def pretend(self, num_tokens: int) -> None:
        """As if a prompt of `num_tokens` tokens had been read, to time the steps after it."""
        self._reserve(num_tokens, used=0)
        self._begin()
        self.state.pretend(self.num_meta + num_tokens)

    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Yield up to `new_tokens` tokens [B] that follow the prompt tokens [B, T].

        Ends early once every row has produced one of `stop_tokens`; a row that has goes on
        repeating it. Temperature 0 is greedy. Raises ValueError if prompt and new tokens are
        more than `max_tokens`, or if a sampling setting is out of range.
        """
        if tokens.shape[1] + new_tokens - 1 > self.max_tokens:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens and {new_tokens} new ones do not fit into "
                f"max_tokens={self.max_tokens}"
            )
        sampler = Sampler(temperature, top_k, top_p, seed, tokens.device)
        stops = torch.tensor(stop_tokens, dtype=torch.int64, device=tokens.device)
        stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        chosen = sampler(self.prefill(tokens, lengths))
        for count in range(new_tokens):
            if count:
                following = (
                    self.greedy_step(chosen) if sampler.is_greedy else sampler(self.step(chosen))
                )
                chosen = torch.where(stopped, chosen, following) if stop_tokens else following
            yield chosen
            if stop_tokens:
                stopped = stopped | torch.isin(chosen, stops)
                if bool(stopped.all()):
                    return

    def _step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token [B] per row: the likeliest next ones [B], logits [B, V].

        Raises ValueError if there are not as many tokens as rows, or too many in all.
        """
        if tokens.shape != (self.batch_size,):
            raise ValueError(f"tokens: expected [{self.batch_size}], got {list(tokens.shape)}")
        self._reserve(1, used=self.num_tokens)
        if self._compiled is not None:
            # As libraries take them: they do not look.
            tokens = tokens.to(torch.int64).contiguous()
            return self._compiled(tokens, self.num_meta + self.num_tokens - 1)
        logits = self.model.step(tokens, self.state)
        return logits.argmax(-1), logits

    def _begin(self) -> None:
        """Before a request. What the state holds may be lost."""
        if self._compiled is not None:
            self._compiled.begin()

    def _reserve(self, count: int, used: int) -> None:
        if used + count > self.max_tokens:
            raise ValueError(f"{used + count} tokens do not fit into max_tokens={self.max_tokens}")
        self.num_tokens = used + count


class Sampler:
    """Chooses the next token of each row.

    temperature: divides the logits; 0 takes the largest.
    top_k: keep the k largest logits; top_p: keep the smallest set whose probability reaches p.
    Raises ValueError if a setting is out of range.
    """

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature: must be >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: must be >= 1, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: must be in (0, 1], got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the likeliest token."""
        return self.temperature == 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens [B] for logits [B, V]."""
        if self.is_greedy:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            # The token that crosses p still belongs to the set.
            is_beyond = ordered.cumsum(-1) - ordered >= self.top_p
            beyond = torch.zeros_like(is_beyond).scatter(-1, order, is_beyond)
            logits = logits.masked_fill(beyond, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)
