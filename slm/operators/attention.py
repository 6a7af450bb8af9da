"""Softmax attention: grouped-query, rotary, optionally windowed and with normalised q and k.

Letters: B rows, T tokens, D width, H query heads, G key-value heads, K head size, S places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from slm.kernels.attention import attention, attention_step, rotate, visible_keys
from slm.operators.base import Operator, OperatorConfig, Sequence, State, register


@dataclass(frozen=True)
class AttentionConfig(OperatorConfig):
    """Grouped-query attention.

    head_dim: size of a head; the model's width decides how many there are.
    query_groups: query heads that share one key-value head.
    window: tokens a query looks back on, itself included; None: all.
    qk_norm: RMSNorm over each head of q and k before the rotation.
    rope_theta: base of the rotary embedding.
    """

    name: ClassVar[str] = "attention"

    head_dim: int = 64
    query_groups: int = 1
    window: int | None = None
    qk_norm: bool = False
    rope_theta: float = 10000.0

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
        return found

    def kv_width(self, width: int) -> int:
        """G · K: values that keys, and values, take per token."""
        return width // self.query_groups

    def parameters(self, width: int) -> int:
        """Exact number of parameters, without the norm before it."""
        return 2 * width * (width + self.kv_width(width)) + 2 * self.head_dim * self.qk_norm

    def flops_per_token(self, width: int, context: int) -> float:
        """Projections, then scores and weighted sum over what the window shows."""
        seen = context if self.window is None else min(context, self.window)
        return 4.0 * width * (width + self.kv_width(width)) + 4.0 * width * seen

    def state_bytes(self, width: int, context: int, bytes_per_value: int) -> int:
        """Keys and values of what the window shows."""
        seen = context if self.window is None else min(context, self.window)
        return 2 * self.kv_width(width) * seen * bytes_per_value


@dataclass(frozen=True)
class KeyValues:
    """The memory of attention.

    keys (rotated), values: [B|1, N, G, K]; positions: [B|1, N], −1 where nothing is stored.
    next_position: [B|1], the position of the token that comes next.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    next_position: Tensor


class KeyValueCache(State):
    """Keys and values in S static places; position p lives in place p mod S.

    keys, values: [B, S, G, K]; position: [B] int64, tokens seen so far.
    A window needs S = window places only: what it no longer shows is overwritten.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        batch_size, self.num_places = keys.shape[:2]
        self.position = torch.zeros(batch_size, dtype=torch.int64, device=keys.device)
        self.rows = torch.arange(batch_size, device=keys.device)
        self.places = torch.arange(self.num_places, device=keys.device)
        self._forget()

    def _forget(self) -> None:
        # Known to the host, so that the cost follows what is stored and nothing waits for the
        # device: an upper bound of the tokens seen, and whether rows have seen different numbers.
        self.max_position = 0
        self.is_ragged = False

    @property
    def num_used(self) -> int:
        """Places in use, at most."""
        return min(self.max_position, self.num_places)

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
        return KeyValues(self.keys[:, used], self.values[:, used], positions, self.position)

    def write(self, memory: KeyValues, sequence: Sequence) -> None:
        """Store the new tokens that still show, in place."""
        seen = memory.next_position.expand_as(self.position)
        positions = self._stored(self.places, seen)
        # New tokens stand in order at the end of the memory, from each row's old position on.
        source = positions - self.position[:, None]
        is_new = ((source >= 0) & (positions >= 0))[..., None, None]
        source = source.clamp(0, memory.keys.shape[1] - 1)[..., None, None]
        for cache, new in ((self.keys, memory.keys), (self.values, memory.values)):
            new = new.expand(cache.shape[0], -1, -1, -1).to(cache.dtype)
            cache.copy_(torch.where(is_new, new.take_along_dim(source, dim=1), cache))
        self.position.copy_(seen)
        self.max_position += memory.keys.shape[1]
        self.is_ragged = self.is_ragged or sequence.lengths is not None

    def _stored(self, places: Tensor, seen: Tensor) -> Tensor:
        """[B, S]: the newest position below `seen` [B] that lives in each place, or < 0."""
        newest = seen[:, None] - 1
        return newest - (newest - places) % self.num_places

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one token k, v [B, G, K] per row, and give keys, values and which are visible."""
        place = self.position % self.num_places
        self.keys[self.rows, place] = k.to(self.keys.dtype)
        self.values[self.rows, place] = v.to(self.values.dtype)
        self.position += 1
        self.max_position += 1
        used = slice(self.num_used)
        visible = self.places[used] < self.position[:, None] if self.is_ragged else None
        return self.keys[:, used], self.values[:, used], visible


@register(AttentionConfig)
class Attention(Operator):
    """Grouped-query attention with rotary positions; see `AttentionConfig`."""

    reads = ("qkv_proj.weight",)
    writes = ("o_proj.weight",)

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // config.head_dim
        self.num_kv_heads = self.num_heads // config.query_groups
        kv_width = config.kv_width(width)
        self.qkv_proj = nn.Linear(width, width + 2 * kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def scan(
        self, x: Tensor, sequence: Sequence, start: KeyValues | None
    ) -> tuple[Tensor, KeyValues]:
        """See `Operator.scan`. The memory returned holds the new tokens only."""
        num_tokens = x.shape[1]
        place = torch.arange(num_tokens, device=x.device).unsqueeze(0)
        first = place.new_zeros(1) if start is None else start.next_position
        positions = first[:, None] + (place if sequence.ages is None else sequence.ages)
        q, k, v = self._project(x, positions)

        lengths = num_tokens if sequence.lengths is None else sequence.lengths
        memory = KeyValues(k, v, positions, first + lengths)
        visible = self._visible(positions, sequence, start)
        if start is not None:
            k = torch.cat([start.keys.to(k.dtype).expand(x.shape[0], -1, -1, -1), k], dim=1)
            v = torch.cat([start.values.to(v.dtype).expand(x.shape[0], -1, -1, -1), v], dim=1)
        return self.o_proj(attention(q, k, v, visible).flatten(-2)), memory

    def step(self, x: Tensor, state: KeyValueCache) -> Tensor:
        """See `Operator.step`."""
        q, k, v = self._project(x, state.position)
        return self.o_proj(attention_step(q, *state.append(k, v)).flatten(-2))

    def init_state(self, batch_size: int, max_tokens: int) -> KeyValueCache:
        """A cache of `max_tokens` places, or of the window if that is smaller."""
        window = self.config.window
        num_places = max_tokens if window is None else min(window, max_tokens)
        weight = self.o_proj.weight
        shape = (batch_size, num_places, self.num_kv_heads, self.config.head_dim)
        return KeyValueCache(weight.new_zeros(shape), weight.new_zeros(shape))

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, K], k and v [..., G, K] of x [..., D]; q and k normed and rotated."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim))
        num_heads = [self.num_heads, self.num_kv_heads]
        qk, v = heads.split([sum(num_heads), self.num_kv_heads], dim=-2)
        if self.config.qk_norm:
            q, k = qk.split(num_heads, dim=-2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        q, k = rotate(qk, positions, self.config.rope_theta).split(num_heads, dim=-2)
        return q, k, v

    def _visible(
        self, positions: Tensor, sequence: Sequence, start: KeyValues | None
    ) -> Tensor | None:
        """[B|1, T, N + T] bool; None when plain causal attention says the same."""
        window = self.config.window
        is_short = window is None or positions.shape[1] <= window
        if start is None and sequence.documents is None and is_short:
            return None
        visible = visible_keys(positions, positions, window)
        if sequence.documents is not None:
            documents = sequence.documents
            visible = visible & (documents.unsqueeze(-1) == documents.unsqueeze(-2))
        if start is None:
            return visible
        before = visible_keys(positions, start.positions, window)
        batch_size = max(visible.shape[0], before.shape[0])
        return torch.cat([x.expand(batch_size, -1, -1) for x in (before, visible)], dim=-1)
