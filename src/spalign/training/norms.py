"""RMSNorm in few passes over the hidden states: the models' own code makes a dozen, most of them in float32.

On CUDA by torch's fused kernel, on a CPU a stretch of tokens at a time, so that what is made on the way stays in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spalign.training.tiles import slices

STRETCH = 1 << 18
"""Numbers (tokens times width) that are worked on at a time on a CPU: 1 MB in float32."""


def fuse_norms(model: nn.Module) -> None:
    """transformers' layers whose code is that of Llama's RMSNorm, as most are, compute it by `rms_norm`; others stay.

    On a CPU only where a gradient is wanted.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    llama = _code(LlamaRMSNorm)
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("transformers.") and _code(kind) == llama and "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)


def _code(kind: type[nn.Module]) -> Any:
    code = getattr(kind.forward, "__code__", None)
    return code and (code.co_code, code.co_names, code.co_consts)


def _forward(norm: Any, own: Any, hidden: Tensor) -> Tensor:
    trains = hidden.device.type == "cpu" and torch.is_grad_enabled() and (hidden.requires_grad or norm.weight.requires_grad)
    return rms_norm(hidden, norm.weight, norm.variance_epsilon) if hidden.is_cuda or trains else own(hidden)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """hidden: (..., width); weight: (width,). Computed in float32, rounded to the hidden states' type, then weighed, as Llama does."""
    with torch.autocast(hidden.device.type, enabled=False):  # which would have it in and out in float32
        if hidden.is_cuda:
            return weight * nn.functional.rms_norm(hidden, hidden.shape[-1:], None, epsilon)
        flat = hidden.reshape(-1, hidden.shape[-1])
        out: Tensor = _Stretches.apply(flat, weight, epsilon)  # type: ignore[no-untyped-call]
        return out.view(hidden.shape)


class _Stretches(torch.autograd.Function):
    """With n = x r, r = 1 / sqrt(mean x^2 + epsilon) and p = g w: dx = r (p - n mean(p n)), dw = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out = torch.empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype))
        scale = torch.empty(len(hidden), 1)
        for at in _stretches(hidden):
            x = hidden[at].float()
            torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add_(epsilon), out=scale[at])
            torch.mul(weight, (x * scale[at]).to(hidden.dtype), out=out[at])
        ctx.save_for_backward(hidden, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape)
        for at in _stretches(hidden):
            normed, pull = hidden[at].float() * scale[at], grad[at].float()
            d_weight += (pull * normed).sum(0)
            pull = pull * weight
            d_hidden[at] = pull.addcmul_(normed, (pull * normed).mean(-1, keepdim=True), value=-1).mul_(scale[at])
        return d_hidden, d_weight.to(weight.dtype), None


def _stretches(hidden: Tensor) -> list[slice]:
    return slices(len(hidden), max(1, STRETCH // hidden.shape[-1]))
