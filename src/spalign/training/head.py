"""Log-probabilities of given tokens straight from hidden states: no more than a bounded number of logits ever exist together."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from spalign.training.tiles import KEPT, STRETCH, TILE, slices

_COLUMNS = 1024
"""Of the vocabulary, in `_outer`: what is turned over fits into the cache."""


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
        keeps = to_hidden and (to_weight or to_bias) and len(hidden) * len(weight) <= KEPT[hidden.device.type == "cpu"]
        head = _Head(len(hidden), weight, bias, scale, cap, dtype, whole=keeps)
        direction = torch.empty_like(hidden) if to_hidden else None
        for at in head.tiles:
            out[at], pull = head.pull(hidden[at], target[at])
            if direction is not None:
                direction[at] = (pull @ head.weight).to(hidden.dtype)
        ctx.save_for_backward(hidden if to_weight or to_bias else None, weight, bias, target, direction, head.products if keeps else None)
        ctx.how = (scale, cap, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, direction, kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_weight = d_bias = None
        if kept is not None:
            d_weight = _outer(kept, (hidden * grad[:, None]).to(kept.dtype)) if to_weight else None
            d_bias = sum(grad[at] @ kept[at].float() for at in slices(len(kept), 256)) if to_bias else None
        elif to_weight or to_bias:  # tiles are added up in fp32, whatever they are computed in
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if to_weight else None
            d_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if to_bias else None
            head = _Head(len(hidden), weight, bias, *ctx.how, whole=False)
            for at in head.tiles:
                _, pull = head.pull(hidden[at], target[at])
                if d_weight is not None:
                    d_weight += pull.T @ (hidden[at] * grad[at, None]).to(pull.dtype)
                if d_bias is not None:
                    d_bias += grad[at] @ pull.float()
        return (
            direction * grad[:, None].to(direction.dtype) if to_hidden else None,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


class _Head:
    """Logits and what is made of them, in memory that every tile uses again: fresh pages cost as much as the arithmetic on them.

    whole: all tokens are one tile, as products are quickest; float32 is between a stretch of them at a time in either case.
    """

    def __init__(
        self, tokens: int, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None, dtype: torch.dtype, *, whole: bool
    ) -> None:
        self.weight, self.bias, self.scale, self.cap = weight.to(dtype), bias, scale, cap
        cpu = weight.device.type == "cpu"
        size = tokens if whole else min(tokens, max(1, TILE[cpu] // len(weight)))
        self.tiles = slices(tokens, size)
        self.stretch = min(size, max(1, STRETCH[cpu] // len(weight)))
        self.logits = torch.empty(self.stretch, len(weight), device=weight.device)
        self.products = torch.empty(size, len(weight), dtype=dtype, device=weight.device)

    def pull(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens,) log-probability of `target`, and (tokens, vocabulary) d logp / d (h W^T + b), which the next call overwrites."""
        out = torch.mm(hidden.to(self.weight.dtype), self.weight.T, out=self.products[: len(hidden)])
        return torch.cat([self._turn(out[at], target[at]) for at in slices(len(out), self.stretch)]), out

    def _turn(self, products: Tensor, target: Tensor) -> Tensor:
        """Log-probabilities of `target` from products h W^T, which become pulls."""
        z = self.logits[: len(products)].copy_(products)
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
        products.copy_(pull)
        return there - top - total.log()


def _outer(pulls: Tensor, hidden: Tensor) -> Tensor:
    """pulls^T hidden; on a CPU a stretch of the vocabulary at a time, from memory as it lies, which is quicker by half."""
    if pulls.device.type != "cpu":
        return pulls.T @ hidden
    out, across = torch.empty(pulls.shape[1], hidden.shape[1], dtype=pulls.dtype), hidden.T.contiguous()
    for at in slices(pulls.shape[1], _COLUMNS):
        out[at] = (across @ pulls[:, at]).T
    return out


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
