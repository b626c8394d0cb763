"""What one training step of a large model costs a GPU, counted without one: a roofline of every operation.

    python benchmarks/passes.py [--shape llama-8b] [--lora] [--prompts 2] [--before] [--bandwidth 4000] [--peak 805]

The step of `train_step.py --shape llama-8b` runs on torch's meta device. An operation takes what is longer of its arithmetic at `peak`
TFLOP/s and of what it reads and writes at `bandwidth` GB/s; attention's kernel is left out. --before: as on 2026-11-27, with PEFT's
passes and casts, gradients of rows added by atomics (taken as four times the bytes) and RMSNorm by the model's own code.

A lower bound: what was measured took 1.15 and 1.20 times as long (benchmarks/results/2026-11-27-h200.md). Prints the costliest
operations, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import SHAPES, data, needed

import spalign.training.attention as rows
from spalign.training import norms
from spalign.training.adapters import fuse_adapters
from spalign.training.batches import _to, collate, prepare

VIEWS = {
    "view", "t", "transpose", "expand", "unsqueeze", "slice", "select", "_unsafe_view", "detach", "permute", "as_strided", "alias",
    "squeeze", "split", "unbind", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "is_same_size",
}  # fmt: skip


class Roofline(TorchDispatchMode):
    def __init__(self, bandwidth: float, peak: float) -> None:
        super().__init__()
        self.bandwidth, self.peak = bandwidth, peak
        self.seconds: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.removeprefix("aten::")
        if name in VIEWS:
            return out
        read = [_bytes(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [_bytes(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
        moved, flops = sum(read) + sum(written), 0
        if name in ("mm", "addmm_"):
            a, b = args[-2:]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif name in ("embedding", "index_select"):
            moved = 2 * sum(written)
        elif name == "index_copy_":
            moved = 2 * read[-1]
        elif name in ("zeros", "ones", "zeros_like", "ones_like", "new_zeros", "fill_", "zero_"):
            moved = sum(written)
        elif name.startswith("index_add"):
            moved *= 4
        by_flops, by_memory = flops / self.peak, moved / self.bandwidth
        self.seconds["products" if by_flops > by_memory else name] += max(by_flops, by_memory)
        self.calls += 1
        return out


def _bytes(x: Tensor) -> int:
    size = x.element_size()
    for width, stride in zip(x.shape, x.stride(), strict=True):
        size *= width if stride else 1
    return size


class _Kernel(torch.autograd.Function):
    """Attention, for nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class _Norm(torch.autograd.Function):
    """A fused RMSNorm: one read and one write, two and one on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return -x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + ctx.saved_tensors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--bandwidth", type=float, default=4000, help="GB/s")
    parser.add_argument("--peak", type=float, default=805, help="TFLOP/s")
    args = parser.parse_args()
    groups = step_groups(args)
    model = step_model(args)
    batch = _to(collate(groups, layout="packed", pad=0), torch.device("meta"))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "source", "target", "packed")}
    with Roofline(args.bandwidth * 1e9, args.peak * 1e12) as roofline:
        model(use_cache=False, attention_mask=torch.ones(1, 1, 1, 1, device="meta"), **inputs).sum().backward()
    for name, seconds in roofline.seconds.most_common(12):
        print(f"{1e3 * seconds:8.1f} ms  {name}")
    total, facts = sum(roofline.seconds.values()), needed(model, groups, args.lora)
    share = facts["flops"] / args.peak / 1e12 / total
    print(json.dumps({"ms": round(1e3 * total, 1), "calls": roofline.calls, "tokens": facts["tokens"], "share": round(share, 3)}))


def step_groups(args: argparse.Namespace) -> list[Any]:
    from transformers import AutoTokenizer

    from spalign.engines.models import resolve
    from spalign.training.groups import group_rows
    from spalign.training.rows import RowTokens, encode_row

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo"))
    tokens = RowTokens(tokenizer)
    encoded = (encode_row(row, i, tokens=tokens) for i, row in enumerate(data(tokenizer, args, 5, args.prompts)))
    return group_rows(encoded, max_length=1 << 20, needs_gap=False)[0]


def step_model(args: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.is_autocast_enabled = lambda *_: False  # it knows no meta device; adapters are in bf16 here, as autocast computes
    rows.sdpa_attention_forward = lambda _, q, k, v, *__, **___: (_Kernel.apply(q, k, v).transpose(1, 2).contiguous(), None)
    if args.before:
        new = rows._rows
        rows._rows = lambda x, index, _: new(x, index, {})
        rows._Back.apply = staticmethod(lambda joined, back: joined.index_select(0, back))
    else:
        norms._forward = lambda norm, _, hidden: norm.weight * _Norm.apply(hidden)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[args.shape]), dtype=torch.bfloat16)
    prepare(model)
    if args.lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        model.to("meta", torch.bfloat16)
        for module in model.modules():
            if args.before and isinstance(module, Linear):
                module._cast_input_dtype = lambda x, _: x.float().to(torch.bfloat16)
        if not args.before:
            fuse_adapters(model)
    return model.train()


if __name__ == "__main__":
    main()
