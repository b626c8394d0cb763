"""LoRA in training: a frozen layer and its adapter in one step of autograd.

PEFT adds the adapter's output to the layer's in several passes over tensors as large as the layer's output, and casts the layer's input
for itself. Those passes move memory and compute nothing. Here both products of each direction write to one output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_adapters(model: Any) -> None:
    """Makes PEFT's plain LoRA layers compute as `frozen_with_adapter`; what is saved, merged or switched off stays PEFT's business.

    Left to PEFT: quantised and other than linear layers, DoRA and its kind, several adapters at once, dropout, trained biases, layers with
    hooks, weights that are elsewhere (ZeRO-3, FSDP1, tensor parallel, offloaded), and types that PEFT would cast (adapters in float32 on a
    base in bf16 without autocast).
    """
    from peft.tuners.lora.layer import Linear

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = partial(_forward, module, module.forward)


def _forward(layer: Any, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return own(x, *args, **kwargs)
    (name,) = layer.active_adapters
    base = layer.base_layer
    if name not in layer.lora_A or layer.lora_variant.get(name) or layer.lora_bias[name] or any(p.requires_grad for p in base.parameters()):
        return own(x)
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    if drops or not all(map(_plain, (base, layer.lora_A[name], layer.lora_B[name]))):
        return own(x)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    parts = [x, base.weight, a, b, *([] if base.bias is None else [base.bias])]
    if any(type(p) not in (Tensor, nn.Parameter) or hasattr(p, "ds_id") for p in parts):
        return own(x)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
        kind = torch.get_autocast_dtype(x.device.type)
        parts = [p.to(kind) for p in parts]
    elif len({p.dtype for p in parts}) != 1:
        return own(x)
    return frozen_with_adapter(*parts[:4], scaling=layer.scaling[name], bias=parts[4] if base.bias is not None else None)


def _plain(linear: nn.Module) -> bool:
    """Nobody wraps it (FSDP1), hooks into it, or brings its weights when it is called (accelerate's offloading)."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and "forward" not in vars(linear) and not hooks


def frozen_with_adapter(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, bias: Tensor | None = None) -> Tensor:
    """W x + bias + scaling B A x; W and bias get no gradient.

    x: (..., in); weight: (out, in); a: (rank, in); b: (out, rank); bias: (out,); one type. Returns (..., out).
    """
    out: Tensor = _FrozenWithAdapter.apply(x, weight, a, b, scaling, bias)  # type: ignore[no-untyped-call]
    return out


class _FrozenWithAdapter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        out = nn.functional.linear(rows, weight, bias).addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            down = grad @ (b * ctx.scaling)  # scaled before, as PEFT does: a product of float16 may be too large for its type
            d_b = grad.T @ (low * ctx.scaling)
            d_a = down.T @ x.reshape(-1, x.shape[-1])
            d_x = (grad @ weight).addmm_(down, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return d_x, None, d_a, d_b, None, None
