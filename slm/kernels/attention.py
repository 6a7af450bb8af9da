"""Softmax attention over keys that carry their positions, and rotary embeddings.

Letters: B rows, T queries, N keys, H query heads, G key-value heads, K head size.
q [B, T, H, K]; k, v [B, N, G, K]. A position of −1 marks an empty place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slm.kernels.backend import current_backend, use_fla
from slm.kernels.decode_attention import DTYPES, attend_places, decode_attention_cpu
from slm.kernels.documents import Documents
from slm.kernels.precision import accumulation_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention [B, T, H, K]; `visible` [B|1, T, N] bool, None for plain causal."""
    use_fla("attention", q, None)
    mask = None if visible is None else visible.unsqueeze(1)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


@dataclass(frozen=True)
class Keys:
    """Keys and values of tokens, in order.

    k, v: [B|1, N, G, K]; positions: [B|1, N], restarting in each document.
    documents: [B, N], number of the document that each is of; None: all see them.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    documents: Tensor | None = None

    def part(self, begin: int, end: int) -> Keys:
        """The tokens from `begin` to before `end`."""
        documents = None if self.documents is None else self.documents[:, begin:end]
        return Keys(
            self.k[:, begin:end], self.v[:, begin:end], self.positions[:, begin:end], documents
        )

    def pinned(self, begin: int, before: int, num_pinned: int) -> Keys:
        """The first positions of the document of token `begin`, if they stand before `before`."""
        position = torch.arange(num_pinned, device=self.positions.device)
        index = begin - (self.positions[:, begin : begin + 1] - position)
        positions = torch.where((index >= 0) & (index < before), position, -1)
        index = index.clamp(0, before - 1)
        k, v = (x.take_along_dim(index[..., None, None], dim=1) for x in (self.k, self.v))
        documents = None if self.documents is None else self.documents.take_along_dim(index, dim=1)
        return Keys(k, v, positions, documents)

    def visible_from(self, queries: Keys, window: int | None, num_pinned: int) -> Tensor:
        """[B|1, T, N] bool: what tokens see of these."""
        visible = visible_keys(queries.positions, self.positions, window, num_pinned)
        if self.documents is None or queries.documents is None:
            return visible
        return visible & (queries.documents.unsqueeze(-1) == self.documents.unsqueeze(-2))


def attention_after(q: Tensor, k: Tensor, v: Tensor, before: Keys | None) -> Tensor:
    """Causal attention [B, T, H, K] of rows, all of which see all of `before`, too."""
    if before is None:
        return attention(q, k, v, None)
    # Plain causal masks let the first query see the first key: pad with queries of nobody.
    num_before = before.k.shape[1]
    k, v = (
        torch.cat([x.expand(len(q), -1, -1, -1), y], dim=1)
        for x, y in ((before.k, k), (before.v, v))
    )
    return attention(F.pad(q, (0, 0, 0, 0, num_before, 0)), k, v, None)[:, num_before:]


def attention_by_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, before: Keys | None
) -> Tensor:
    """As `attention_after`, document by document: what they do not see is not computed."""
    parts = (x.flatten(0, 1).unsqueeze(0).split(documents.lengths, dim=1) for x in (q, k, v))
    outputs = [
        attention_after(one_q, one_k, one_v, before)
        for one_q, one_k, one_v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1).view(q.shape)


def masked_attention(
    q: Tensor,
    new: Keys,
    before: Keys | None,
    window: int | None,
    num_pinned: int = 0,
    least_position: int = 0,
    block_size: int = 128,
) -> Tensor:
    """Softmax attention [B, T, H, K] of the tokens `new` over their own document and `before`.

    A window is computed by blocks of queries over the keys that they can see, so that memory grows
    with T · window.

    before: what each document begins with, first positions first.
    window: tokens a query looks back on, itself included; None: all.
    num_pinned: how many first positions of a document the window always shows.
    least_position: no token is at a smaller one.
    """
    num_tokens, batch_size = q.shape[1], q.shape[0]
    block_size = num_tokens if window is None else max(window, block_size)
    outputs = []
    for begin in range(0, num_tokens, block_size):
        end = min(begin + block_size, num_tokens)
        low = 0 if window is None else max(0, begin - window + 1)
        parts = [new.part(low, end)]
        if low > 0 and least_position < num_pinned:
            parts.insert(0, new.pinned(begin, low, num_pinned))
        if before is not None:
            # Unless documents begin here, too, the window has left behind all but what is pinned.
            is_near = window is None or begin < window or new.documents is not None
            parts.insert(0, before if is_near else before.part(0, num_pinned))
        queries = new.part(begin, end)
        masks = [part.visible_from(queries, window, num_pinned) for part in parts]
        num_masks = max(mask.shape[0] for mask in masks)
        visible = torch.cat([mask.expand(num_masks, -1, -1) for mask in masks], dim=-1)
        k, v = (
            torch.cat([x.expand(batch_size, -1, -1, -1) for x in tensors], dim=1)
            for tensors in ([part.k for part in parts], [part.v for part in parts])
        )
        outputs.append(attention(q[:, begin:end], k, v, visible))
    return torch.cat(outputs, dim=1)


def attention_step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
    """One query per row, q [B, H, K], over the first `lengths` [B] places of k, v [B, N, G, K].

    None: all of them. Lengths are tensors where a step is compiled or captured for many.
    """
    if lengths is not None:
        if (
            q.is_cuda
            and current_backend() != "torch"
            and hasattr(torch.ops.slm, "decode_attention")
        ):
            # Where `slm.kernels.triton.decode_attention` has been imported.
            return torch.ops.slm.decode_attention(q, k, v, lengths)
        if torch.compiler.is_compiling() and q.device.type == "cpu" and k.dtype in DTYPES:
            query = q.float().contiguous()
            y = decode_attention_cpu(query, k, v, lengths, torch.get_num_threads())
            return y.to(q.dtype)
    return attend_places(q, k, v, lengths)


def visible_keys(
    query_positions: Tensor, key_positions: Tensor, window: int | None, num_pinned: int = 0
) -> Tensor:
    """[B|1, T, N] bool: causal, and not further back than `window` tokens, itself included.

    The first `num_pinned` positions are visible from outside the window, too.
    """
    distance = query_positions.unsqueeze(-1) - key_positions.unsqueeze(-2)
    visible = (distance >= 0) & (key_positions >= 0).unsqueeze(-2)
    if window is None:
        return visible
    return visible & ((distance < window) | (key_positions < num_pinned).unsqueeze(-2))


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021), rotate-half form: x [..., H, K], positions [...]."""
    # What a compiler makes is its own, and not for others to find.
    of = _frequencies if torch.compiler.is_compiling() else _known_frequencies
    frequencies = of(x.shape[-1], theta, x.device)
    angles = positions[..., None, None] * frequencies  # [..., 1, K / 2]
    cos, sin = angles.cos(), angles.sin()
    if torch.is_grad_enabled() and x.device.type == "cpu":
        return _Rotate.apply(x, cos, sin)
    left, right = x.to(accumulation_dtype(x)).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Its gradient turns back; fewer passes than torch makes of the elementary steps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `rotate`; cos, sin [..., 1, K / 2]."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Of x."""
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = x * torch.cat([cos, cos], dim=-1)  # in at least fp32, as cos is
    (left, right), (y_left, y_right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_left.addcmul_(right, sin, value=-1)
    y_right.addcmul_(left, sin)
    return y.to(x.dtype)


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # By Python: at a position in the thousands the last bit shows, and compilers round their own
    # way.
    values = [theta ** (-place / head_dim) for place in range(0, head_dim, 2)]
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _known_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # Not a module buffer: those are garbage after initialisation on the meta device.
    with torch.inference_mode(False):
        return _frequencies(head_dim, theta, device)
