"""Log-probabilities of given tokens straight from hidden states, a tile of tokens at a time: the logits of a batch never exist together."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from spalign.training.tiles import KEPT, TILE


class _TokenLogps(torch.autograd.Function):
    """log softmax(f(h W^T + b))[target] with f the model's scaling and soft-capping.

    A token's gradient is a multiple of its pull, d logp / d (h W^T + b), so the hidden states' is ready in the forward pass, up to a factor
    a token. The weight's needs the pulls again: they are kept where they are few, and else made again a tile at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, cap: float | None, dtype: torch.dtype
    ) -> Tensor:
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        direction = torch.empty_like(hidden) if to_hidden else None
        keeps = to_hidden and (to_weight or to_bias) and len(hidden) * len(weight) <= KEPT[hidden.device.type == "cpu"]
        kept = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device) if keeps else None
        tile = _Tile(len(hidden), weight, bias, scale, cap, dtype)
        for at in tile.slices:
            out[at], pull = tile.pull(hidden[at], target[at], None if kept is None else kept[at])
            if direction is not None:
                direction[at] = (pull @ tile.weight).to(hidden.dtype)
        ctx.save_for_backward(hidden if to_weight or to_bias else None, weight, bias, target, direction, kept)
        ctx.how = (scale, cap, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, direction, kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        # tiles are added up in fp32, whatever they are computed in; pulls that were kept are one product
        whole = kept is not None and to_weight
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if to_weight and not whole else None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if bias is not None and to_bias else None
        if whole:
            d_weight = kept.T @ (hidden * grad[:, None]).to(kept.dtype)
        if d_bias is not None or (to_weight and not whole):
            tile = _Tile(len(hidden), weight, bias, *ctx.how)
            for at in tile.slices:
                pull = kept[at] if kept is not None else tile.pull(hidden[at], target[at], None)[1]
                if d_bias is not None:
                    d_bias += grad[at] @ pull.float()
                if d_weight is not None and not whole:
                    d_weight += pull.T @ (hidden[at] * grad[at, None]).to(pull.dtype)
        return (
            direction * grad[:, None].to(direction.dtype) if to_hidden else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


class _Tile:
    """A tile of logits and what is made of it, in memory that every tile uses again: fresh pages cost as much as the arithmetic on them."""

    def __init__(self, tokens: int, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.scale, self.cap = weight.to(dtype), bias, scale, cap
        size = min(tokens, max(1, TILE[weight.device.type == "cpu"] // len(weight)))
        self.slices = [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]
        self.logits = torch.empty(size, len(weight), device=weight.device)
        self.products = torch.empty(size, len(weight), dtype=dtype, device=weight.device)

    def pull(self, hidden: Tensor, target: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(tokens,) log-probability of `target`, and (tokens, vocabulary) d logp / d (h W^T + b), into `out` or what the next call uses."""
        out = self.products[: len(hidden)] if out is None else out
        torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=out)
        z = self.logits[: len(hidden)].copy_(out)
        if self.bias is not None:
            z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        bend = None
        if self.cap is not None:
            z.div_(self.cap).tanh_()
            bend = 1 - z**2
            z *= self.cap
        there = z.gather(-1, target[:, None])[:, 0]
        top = z.amax(-1)
        total = z.sub_(top[:, None]).exp_().sum(-1)
        pull = z.div_(-total[:, None])
        pull.scatter_add_(-1, target[:, None], torch.ones_like(total)[:, None])
        if bend is not None:
            pull *= bend
        if self.scale != 1.0:
            pull *= self.scale
        return there - top - total.log(), out.copy_(pull)


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
        head = the_head(self)  # looked up now: FSDP and PEFT replace it
        if not self.spalign_tiled or not _plain(head):
            one_row = kwargs["input_ids"].shape[0] == 1
            logits = original(*args, **kwargs, logits_to_keep=source if one_row else 0).logits.flatten(0, 1)
            return -torch.nn.functional.cross_entropy((logits if one_row else logits[source]).float(), target, reduction="none")
        hidden = self.base_model(*args, **kwargs).last_hidden_state.flatten(0, 1)
        return token_logps(hidden[source], head.weight, target, bias=head.bias, scale=scale, cap=cap)

    model.forward = MethodType(forward, model)
    model.spalign_tiled = True


def the_head(model: Any) -> Any:
    """The module that makes the logits; of one that PEFT trains whole (`modules_to_save`) the copy that is in use."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    used = next(iter(head.active_adapters), None)
    return head.original_module if head.disable_adapters or used not in copies else copies[used]


def _plain(head: Any) -> bool:
    """A linear layer whose weight says it all: no adapter on it, not quantised."""
    return isinstance(head, torch.nn.Linear) and head.weight.is_floating_point() and head.weight.dim() == 2
