"""Softmax attention: grouped-query, rotary, optionally windowed and with normalised q and k.

Letters: B rows, T tokens, D width, H query heads, G key-value heads, K head size, S places.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from slm.kernels.attention import (
    Keys,
    attention_after,
    attention_by_document,
    attention_step,
    masked_attention,
    rotate,
)
from slm.kernels.documents import Documents
from slm.operators.base import Operator, OperatorConfig, Sequence, State, register
from slm.operators.parts import RMSNorm

# Compiled and captured steps attend to whole blocks of so many places.
PLACES_BLOCK = 64
# Documents of so many tokens on average are attended to one by one.
DOCUMENT_TOKENS = 32


@dataclass(frozen=True)
class AttentionConfig(OperatorConfig):
    """Grouped-query attention.

    head_dim: size of a head; the model's width decides how many there are.
    query_groups: query heads that share one key-value head.
    window: tokens a query looks back on, itself included; None: all.
    qk_norm: RMSNorm over each head of q and k before the rotation.
    rope_theta: base of the rotary embedding.
    rope_ntk: longest context over the one the base was meant for; above 1 the base grows so that
        the slowest rotation spans it, as in Nemotron-Flash (static NTK scaling).
    pinned_tokens: first tokens, such as the meta tokens, that the window always shows as well
        (Hymba, Dong et al. 2024).
    """

    name: ClassVar[str] = "attention"
    short_name: ClassVar[str] = "A"

    head_dim: int = 64
    query_groups: int = 1
    window: int | None = None
    qk_norm: bool = False
    rope_theta: float = 10000.0
    rope_ntk: float = 1.0
    pinned_tokens: int = 0

    def problems(self, width: int) -> list[str]:
        """Why this operator cannot be built at this width; empty when it can."""
        found = []
        if self.head_dim < 2 or self.head_dim % 2:
            found.append(f"attention.head_dim: must be even and > 0, got {self.head_dim}")
        elif width % self.head_dim:
            found.append(f"attention.head_dim: must divide the width {width}, got {self.head_dim}")
        elif self.query_groups < 1 or width // self.head_dim % self.query_groups:
            found.append(
                f"attention.query_groups: must divide the {width // self.head_dim} heads, "
                f"got {self.query_groups}"
            )
        if self.window is not None and self.window < 1:
            found.append(f"attention.window: must be > 0, got {self.window}")
        if self.rope_theta <= 0:
            found.append(f"attention.rope_theta: must be > 0, got {self.rope_theta}")
        if self.rope_ntk < 1 or (self.rope_ntk > 1 and self.head_dim == 2):
            found.append(
                "attention.rope_ntk: must be >= 1, and 1 if head_dim is 2, "
                f"got {self.rope_ntk} with head_dim {self.head_dim}"
            )
        if self.pinned_tokens < 0 or (self.pinned_tokens and self.window is None):
            found.append(
                "attention.pinned_tokens: must be >= 0, and 0 without a window, "
                f"got {self.pinned_tokens} with window {self.window}"
            )
        return found

    @property
    def rope_base(self) -> float:
        """Base of the rotary embedding after NTK scaling."""
        exponent = self.head_dim / max(self.head_dim - 2, 1)
        return self.rope_theta * (2.0 * self.rope_ntk - 1.0) ** exponent

    def num_seen(self, context: int) -> int:
        """How many of `context` tokens the last one sees, itself included."""
        return context if self.window is None else min(context, self.pinned_tokens + self.window)

    def kv_width(self, width: int) -> int:
        """G · K: values that keys, and values, take per token."""
        return width // self.query_groups

    def parts(self, width: int) -> dict[str, dict[str, int]]:
        """See `OperatorConfig.parts`."""
        kv_width = self.kv_width(width)
        return {"qkv_proj.weight": {"q": width, "k": kv_width, "v": kv_width}}

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        return 2 * width * (width + self.kv_width(width)) + 2 * self.head_dim * self.qk_norm

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, then scores and weighted sum over what the window shows."""
        projections = 4.0 * width * (width + self.kv_width(width))
        return projections + 4.0 * width * self.num_seen(context)

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """Keys and values of what the window shows."""
        return 2 * self.kv_width(width) * self.num_seen(context) * bytes_per_value


@dataclass(frozen=True)
class KeyValues:
    """The memory of attention.

    keys (rotated), values: [B|1, N, G, K]; positions: [B|1, N], −1 where nothing is stored.
    next_position: [B|1], the position of the token that comes next.
    least_position: what the host knows of `next_position`: it is not smaller.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    next_position: Tensor
    least_position: int


class KeyValueCache(State):
    """Keys and values in S static places.

    keys, values: [B, S, G, K]; position: [B] int64, tokens seen so far.
    The first `num_pinned` positions keep their places; the others share the rest of the places,
    in turns. So a window needs no more of them than it shows: the rest is overwritten.
    """

    def __init__(self, keys: Tensor, values: Tensor, num_pinned: int) -> None:
        self.keys, self.values, self.num_pinned = keys, values, num_pinned
        self.position = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        self.has_fixed_shapes = False
        self._forget()

    def _forget(self) -> None:
        # Known to the host, so that the cost follows what is stored and nothing waits for the
        # device: bounds of the tokens seen, equal unless rows have seen different numbers.
        self.min_position = self.max_position = 0

    @property
    def num_places(self) -> int:
        """Places for a token's keys and values."""
        return self.keys.shape[1]

    @property
    def num_shared(self) -> int:
        """Places that are not one position's own."""
        return self.num_places - self.num_pinned

    @property
    def places(self) -> Tensor:
        """[S]: their numbers."""
        return torch.arange(self.num_places, device=self.keys.device)

    @property
    def num_used(self) -> int:
        """Places in use, at most."""
        if self.has_fixed_shapes:
            return self.num_places
        return min(self.max_position, self.num_places)

    def upto(self, num_tokens: int) -> KeyValueCache:
        """A view of the places that `num_tokens` tokens can be in, rounded up to whole blocks.

        Its steps attend to all of them, those that hold nothing yet being masked.
        """
        count = max(num_tokens, self.num_pinned + 1)
        used = slice(min(-(-count // PLACES_BLOCK) * PLACES_BLOCK, self.num_places))
        # What the host knows of these, from now on: they are bounds.
        self.max_position = max(self.max_position, num_tokens)
        view = copy.copy(self)
        view.keys, view.values, view.has_fixed_shapes = (
            self.keys[:, used],
            self.values[:, used],
            True,
        )
        return view

    def pretend(self, num_tokens: int) -> None:
        """As if `num_tokens` tokens had been read; what the places hold stays."""
        self.position.fill_(num_tokens)
        self.min_position = self.max_position = num_tokens

    def tensors(self) -> list[Tensor]:
        """Keys, values and positions."""
        return [self.keys, self.values, self.position]

    def reset(self) -> None:
        """Forget everything, in place."""
        super().reset()
        self._forget()

    def read(self) -> KeyValues | None:
        """What the cache holds, as a memory; None when it is empty."""
        if self.num_used == 0:
            return None
        used = slice(self.num_used)
        positions = self._stored(self.places[used], self.position)
        return KeyValues(
            self.keys[:, used], self.values[:, used], positions, self.position, self.min_position
        )

    def write(self, memory: KeyValues, sequence: Sequence) -> None:
        """Store the new tokens that still show, in place."""
        begin, end = self.max_position, self.max_position + memory.keys.shape[1]
        pairs = ((self.keys, memory.keys), (self.values, memory.values))
        seen = memory.next_position.expand_as(self.position)
        if memory.least_position == end <= self.num_places:
            # All rows go on at the same place, and nothing is overwritten yet.
            for cache, new in pairs:
                cache[:, begin:end] = new
        else:
            positions = self._stored(self.places, seen)
            # New tokens stand in order at the end of the memory, from each row's old position on.
            source = positions - self.position[:, None]
            is_new = ((source >= 0) & (positions >= 0))[..., None, None]
            source = source.clamp(0, memory.keys.shape[1] - 1)[..., None, None]
            for cache, new in pairs:
                new = new.expand(cache.shape[0], -1, -1, -1).to(cache.dtype)
                cache.copy_(torch.where(is_new, new.take_along_dim(source, dim=1), cache))
        self.position.copy_(seen)
        self.max_position = end
        self.min_position = memory.least_position

    def _stored(self, places: Tensor, seen: Tensor) -> Tensor:
        """[B, S]: the newest position below `seen` [B] that lives in each place, or −1."""
        turns = (seen[:, None] - 1 - places) // self.num_shared
        newest = places + turns * self.num_shared
        newest = torch.where(places < self.num_pinned, places, newest)
        return torch.where(places < seen[:, None], newest, -1)

    def _place(self, position: Tensor) -> Tensor:
        """The place where a position lives."""
        if self.num_pinned == 0:
            return position % self.num_places
        shared = self.num_pinned + (position - self.num_pinned) % self.num_shared
        return torch.where(position < self.num_pinned, position, shared)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one token k, v [B, G, K] per row; give keys, values and how many places are used.

        The last is [B], or None if it is all that are given.
        """
        place = self._place(self.position)
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, place] = k.to(self.keys.dtype)
        self.values[rows, place] = v.to(self.values.dtype)
        self.position += 1
        self.min_position += 1
        self.max_position += 1
        used = slice(self.num_used)
        is_masked = self.has_fixed_shapes or self.min_position < self.max_position
        lengths = self.position if is_masked else None
        return self.keys[:, used], self.values[:, used], lengths


@register(AttentionConfig)
class Attention(Operator):
    """Grouped-query attention with rotary positions; see `AttentionConfig`."""

    reads = ("qkv_proj.weight",)
    writes = ("o_proj.weight",)
    value_parts = ("v",)

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        self.num_kv_heads = self.num_heads // config.query_groups
        kv_width = config.kv_width(width)
        self.qkv_proj = nn.Linear(width, width + 2 * kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=1e-6)
            self.k_norm = RMSNorm(config.head_dim, eps=1e-6)

    def scan(
        self, x: Tensor, sequence: Sequence, start: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """See `Operator.scan`. The memory returned holds the new tokens only."""
        num_tokens, documents = x.shape[1], sequence.documents
        place = torch.arange(num_tokens, device=x.device).unsqueeze(0)
        first = place.new_zeros(1) if start is None else start.next_position
        positions = first[:, None] + (place if documents is None else documents.ages)
        q, k, v = self._project(x, positions)

        least = 0 if start is None else start.least_position
        if sequence.lengths is None:
            memory = KeyValues(k, v, positions, first + num_tokens, least + num_tokens)
        else:
            memory = KeyValues(k, v, positions, first + sequence.lengths, least)
        return self.o_proj(self._attend(q, memory, sequence, start).flatten(-2)), memory

    def step(self, x: Tensor, state: KeyValueCache) -> Tensor:
        """See `Operator.step`."""
        q, k, v = self._project(x, state.position)
        return self.o_proj(attention_step(q, *state.append(k, v)).flatten(-2))

    def init_state(self, batch_size: int, max_tokens: int) -> KeyValueCache:
        """A cache of `max_tokens` places, or of what the window shows if that is less."""
        num_places = self.config.num_seen(max_tokens)
        weight = self.o_proj.weight
        # Places first in memory: a view of the first of them has the same strides, however many
        # there are, so that steps compiled for one cache are right for all.
        shape = (num_places, batch_size, self.num_kv_heads, self.config.head_dim)
        keys, values = (weight.new_zeros(shape).transpose(0, 1) for _ in range(2))
        num_pinned = min(self.config.pinned_tokens, num_places - 1)
        return KeyValueCache(keys, values, num_pinned)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, K], k and v [..., G, K] of x [..., D]; q and k normed and rotated."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim))
        num_heads = [self.num_heads, self.num_kv_heads]
        qk, v = heads.split([sum(num_heads), self.num_kv_heads], dim=-2)
        if self.config.qk_norm:
            q, k = qk.split(num_heads, dim=-2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        q, k = rotate(qk, positions, self.config.rope_base).split(num_heads, dim=-2)
        return q, k, v

    def _attend(
        self, q: Tensor, new: KeyValues, sequence: Sequence, start: KeyValues | None
    ) -> Tensor:
        """y [B, T, H, K] of the new tokens."""
        config, documents = self.config, sequence.documents
        before = None
        if start is not None:
            before = Keys(start.keys.to(q.dtype), start.values.to(q.dtype), start.positions)
        if self._is_causal(q, start):
            if documents is None:
                return attention_after(q, new.keys, new.values, before)
            is_shared = before is None or len(before.k) == 1
            if is_shared and self._goes_by_document(q, documents):
                return attention_by_document(q, new.keys, new.values, documents, before)
        numbers = None if documents is None else documents.numbers
        keys = Keys(new.keys, new.values, new.positions, numbers)
        least = 0 if start is None else start.least_position
        return masked_attention(q, keys, before, config.window, config.pinned_tokens, least)

    def _goes_by_document(self, q: Tensor, documents: Documents) -> bool:
        """Whether a call for each document pays: where one costs little, and none is compiled."""
        if q.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return documents.begins.numel() >= DOCUMENT_TOKENS * len(documents.lengths)

    def _is_causal(self, q: Tensor, start: KeyValues | None) -> bool:
        """Whether each token sees all that come before it, the memory's being all real."""
        num_tokens = q.shape[1]
        if start is None:
            return self.config.num_seen(num_tokens) == num_tokens
        num_before = start.keys.shape[1]
        # Those before cost as many queries.
        return self.config.window is None and start.least_position == num_before <= num_tokens
