"""Log-probabilities of given tokens straight from hidden states, a tile of tokens at a time: the logits of a batch never exist together."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor

_TILE = 1 << 26
"""Logits of one tile (tokens times vocabulary): 256 MB in fp32, wide enough for the matrix units."""


class _TokenLogps(torch.autograd.Function):
    """log softmax(f(h W^T + b))[target] with f the model's scaling and soft-capping; the backward pass makes each tile's logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        norm = torch.empty_like(out)
        frozen = not ctx.needs_input_grad[1] and not (bias is not None and ctx.needs_input_grad[2])
        ctx.frozen = frozen and ctx.needs_input_grad[0]
        direction = torch.empty_like(hidden) if ctx.frozen else None
        w = weight.to(dtype)
        for at in _tiles(len(hidden), len(weight)):
            z = _logits(hidden[at].to(dtype), w, bias, scale, cap)
            norm[at] = z.logsumexp(-1)
            out[at] = z.gather(-1, target[at, None])[:, 0] - norm[at]
            if direction is not None:  # a frozen head: what the backward pass needs is ready now, up to a factor a token
                direction[at] = (_pull(z, norm[at], target[at], None, scale, cap).to(dtype) @ w).to(hidden.dtype)
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, target, norm)
        ctx.how = (scale, cap, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (direction,) = ctx.saved_tensors
            return direction * grad[:, None].to(direction.dtype), None, None, None, None, None, None
        hidden, weight, bias, target, norm = ctx.saved_tensors
        scale, cap, dtype = ctx.how
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        tiles = _tiles(len(hidden), len(weight))
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        # tiles are added up in fp32, whatever they are computed in
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if to_weight else None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and to_bias else None
        w = weight.to(dtype)
        for at in tiles:
            h = hidden[at].to(dtype)
            pull = _pull(_logits(h, w, bias, scale, cap), norm[at], target[at], grad[at], scale, cap)
            if d_bias is not None:
                d_bias += pull.sum(0)
            pull = pull.to(dtype)
            if d_hidden is not None:
                d_hidden[at] = (pull @ w).to(hidden.dtype)
            if d_weight is not None:
                d_weight += pull.T @ h
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _tiles(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _TILE // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    z = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype)).float()
    if scale != 1.0:
        z *= scale
    return z if cap is None else z.div_(cap).tanh_().mul_(cap)


def _pull(z: Tensor, norm: Tensor, target: Tensor, grad: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """d logp / d (h W^T + b), times `grad` a token; in place of `z` where nothing else needs it."""
    bend = None if cap is None else 1 - (z / cap) ** 2
    factor = torch.ones_like(norm) if grad is None else grad
    pull = z.sub_(norm[:, None]).exp_().mul_(-factor[:, None])
    pull.scatter_add_(-1, target[:, None], factor[:, None])
    if bend is not None:
        pull *= bend
    return pull if scale == 1.0 else pull.mul_(scale)


def token_logps(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    """hidden: (tokens, width); weight: (vocabulary, width); target: (tokens,). Returns (tokens,) nats in fp32.

    scale, cap: logits are multiplied by `scale`, then soft-capped: cap * tanh(logits / cap). Products are in autocast's type, if it is on.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.promote_types(hidden.dtype, weight.dtype)
    out: Tensor = _TokenLogps.apply(hidden, weight, bias, target, scale, cap, dtype)  # type: ignore[no-untyped-call]
    return out


def quirks(config: Any) -> tuple[float, float | None]:
    """(scale, cap) of a model's logits, under the names its configuration may have for them."""
    text = config.get_text_config()
    scale = next((s for n in ("logit_scale", "output_multiplier", "lm_head_multiplier") if (s := getattr(text, n, None)) is not None), None)
    if scale is None and (divisor := getattr(text, "logits_scaling", None)) is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return (1.0 if scale is None else float(scale)), getattr(text, "final_logit_softcapping", None)


def add_logps(model: Any) -> None:
    """Let `model(..., source=, target=)` return log-probabilities instead of logits; all else stays as it was.

    source: (tokens,) places in the flattened rows. It is inside `forward`, so DDP, FSDP and PEFT, which wrap it, see one ordinary forward
    pass. Where `model.spalign_tiled` is false, or the head is more than a linear layer, they come from the model's own logits.
    """
    scale, cap = quirks(model.config)
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, source: Tensor | None = None, target: Tensor | None = None, **kwargs: Any) -> Any:
        if source is None or target is None:
            return original(*args, **kwargs)
        head = self.get_output_embeddings()  # looked up now: FSDP and PEFT replace it
        if not self.spalign_tiled or not _plain(head):
            one_row = kwargs["input_ids"].shape[0] == 1
            logits = original(*args, **kwargs, logits_to_keep=source if one_row else 0).logits.flatten(0, 1)
            return -torch.nn.functional.cross_entropy((logits if one_row else logits[source]).float(), target, reduction="none")
        hidden = self.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
        return token_logps(hidden[source], head.weight, target, bias=head.bias, scale=scale, cap=cap)

    model.forward = MethodType(forward, model)
    model.spalign_tiled = True


def _plain(head: Any) -> bool:
    """A linear layer whose weight says it all: no adapter on it, not quantised."""
    return isinstance(head, torch.nn.Linear) and head.weight.is_floating_point() and head.weight.dim() == 2
