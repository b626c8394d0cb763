"""`spalign estimate` against measured runs on this machine: saved bytes, peak bytes, seconds; estimate / measured, in one run.

    python benchmarks/estimate.py [--quick]

Forward and backward passes of `response_logps` under bf16 autocast, on a tiny Llama of random weights and (without --quick) on the demo
model. Saved: bytes of tensors that autograd keeps at the end of the forward pass, each storage once, without parameters and without
autocast's bf16 copies of them. Peak: bytes of all tensors made in two passes and alive at once: gradients, copies and the head's tile too.
Both with the attention of a GPU, the tiny model also with its norms, and counted by PyTorch's dispatcher, so they do not depend on what
else the machine does; seconds do. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spalign.training import attention, norms
from spalign.training.adapters import fuse_adapters
from spalign.training.batches import collate, prepare, response_logps
from spalign.training.estimate import Device, Method, Plan, Shape, estimate, kept, shape_from
from spalign.training.groups import TrainingGroup, TrainingPair

TINY = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip
RANK = 8


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.known and key not in self.sizes:
                storage = t.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class Saved:
    """What autograd keeps: only what is still kept when it is asked, for some graphs die within the forward pass."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.copies = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
        self.copies |= {shape[::-1] for shape in self.copies}
        self.boxes: weakref.WeakSet[_Box] = weakref.WeakSet()

    def pack(self, tensor: torch.Tensor) -> _Box:
        box = _Box(tensor)
        self.boxes.add(box)
        return box

    def bytes(self) -> int:
        found = {}
        for box in list(self.boxes):
            storage = box.tensor.untyped_storage()
            copy = box.tensor.dtype == torch.bfloat16 and tuple(box.tensor.shape) in self.copies
            if storage._cdata not in self.known and not copy:
                found[storage._cdata] = storage.nbytes()
        return sum(found.values())


class _Box:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps what the kernel of GPUs keeps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        root = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, root)
        return (x * root).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, root = ctx.saved_tensors
        normed = x * root
        return (root * (grad - normed * (grad * normed).mean(-1, keepdim=True))).to(x.dtype), None


def build(config: dict[str, Any], method: Method, *, checkpointing: bool, gpu: bool, weights: str | None = None) -> Any:
    torch.manual_seed(0)
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**config)) if weights is None else AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    )
    own = (lambda norm, _, hidden: norm.weight * _Norm.apply(hidden, norm.variance_epsilon)) if gpu else norms._forward
    with patch.object(norms, "_forward", own):
        prepare(model)
    if method != "full":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=method == "dora")
        model = get_peft_model(model.to(torch.bfloat16), lora)
        fuse_adapters(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if method != "full":
            model.enable_input_require_grads()
    return model.train()


def batch_of(plan: Plan) -> dict[str, Any]:
    rng = random.Random(0)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(plan.model.vocab) for _ in range(n))

    groups = [
        TrainingGroup(ids(plan.prompt_tokens), tuple(ids(plan.response_tokens) for _ in range(plan.responses)), (TrainingPair(0, 1, 1.0),))
        for _ in range(plan.prompts_per_forward)
    ]
    return collate(groups, layout="packed", pad=0)


def measure(model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """saved, peak: bytes. seconds: of a forward and backward pass without counters, after these two have warmed up."""
    gc.collect()
    saved = Saved(model)
    with patch.object(attention, "SHORT", 0):  # estimated are GPUs, where torch's kernel takes short rows, too
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: box.tensor), torch.autocast("cpu", torch.bfloat16):
            logps, _ = response_logps(model, batch)
            saved_bytes = saved.bytes()
        del logps
        model.zero_grad(set_to_none=True)
        gc.collect()
        with Alive(model) as alive:  # the second pass of a step: the first one's gradients are there
            _step(model, batch)
            _step(model, batch)
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    _step(model, batch)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return {"saved": saved_bytes, "peak": alive.peak, "seconds": seconds}


def _step(model: Any, batch: dict[str, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = response_logps(model, batch)
    logps.sum().backward()


def predict(plan: Plan) -> dict[str, float]:
    """What `measure` should find. The peak counts gradients, copies, activations and the head; weights were there before."""
    found = estimate(plan)
    m = found.memory
    return {
        "saved": plan.prompts_per_forward * kept(plan),
        "peak": m.gradients + m.copies + m.activations + m.head,
        "seconds": found.compute_seconds,
    }


def compare(
    shape: Shape,
    config: dict[str, Any],
    method: Method,
    lengths: tuple[int, int, int],
    *,
    checkpointing: bool,
    gpu: bool = False,
    weights: str | None = None,
    flops: float = 1e12,
) -> dict[str, Any]:
    """lengths: tokens of the prompt, responses, tokens of each. One forward pass, of one prompt, is the step. gpu: with its norms."""
    p, k, r = lengths
    plan = Plan(
        shape, Device("gpu" if gpu else "cpu", None, flops, None), method, RANK,
        prompts=1, responses=k, prompt_tokens=p, response_tokens=r, prompts_per_step=1, checkpointing=checkpointing, efficiency=1.0,
    )  # fmt: skip
    model = build(config, method, checkpointing=checkpointing, gpu=gpu, weights=weights)
    measured, predicted = measure(model, batch_of(plan)), predict(plan)
    return {
        "model": shape.name, "method": method, "lengths": list(lengths), "checkpointing": plan.checkpointing, "gpu": gpu,
        "measured": measured, "predicted": predicted, "ratio": {key: round(predicted[key] / measured[key], 3) for key in measured},
    }  # fmt: skip


def gemm_flops() -> float:
    """This machine's bf16 FLOP/s on a large matrix product: the peak that efficiency is a share of."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tiny Llama alone")
    quick = parser.parse_args().quick
    flops = gemm_flops()
    tiny = shape_from({"model_type": "llama", **TINY}, "tiny")
    cases: list[tuple[Shape, dict[str, Any], Method, tuple[int, int, int], bool, bool, str | None]] = [
        (tiny, TINY, method, lengths, checkpointing, gpu, None)
        for method, gpu in (("full", False), ("full", True), ("lora", False), ("lora", True), ("dora", False), ("dora", True))
        for lengths in ((32, 5, 200), (600, 4, 150), (2048, 2, 64))
        for checkpointing in (False, True)
    ]
    if not quick:
        from spalign.engines.models import resolve
        from spalign.training.estimate import SHAPES

        folder = resolve("demo")
        cases += [
            (SHAPES["demo"], {}, method, lengths, checkpointing, False, folder)
            for method in ("full", "lora")
            for lengths in ((40, 5, 200), (512, 4, 100))
            for checkpointing in (False, True)
        ]
    rows = []
    for shape, config, method, lengths, checkpointing, gpu, weights in cases:
        row = compare(shape, config, method, lengths, checkpointing=checkpointing, gpu=gpu, weights=weights, flops=flops)
        rows.append(row)
        ratio = row["ratio"]
        how = f"{'checkpointing' if checkpointing else '':13} {'gpu' if gpu else 'cpu'}"
        print(
            f"{shape.name:6} {method:5} prompt {lengths[0]:5} + {lengths[1]} x {lengths[2]:4} {how}"
            f" saved {row['measured']['saved'] / 1e6:8.1f} MB, estimate x {ratio['saved']:.3f}"
            f" | peak {row['measured']['peak'] / 1e6:8.1f} MB, estimate x {ratio['peak']:.3f}"
            f" | {row['measured']['seconds']:6.2f} s, share of the GEMM peak {ratio['seconds']:.2f}",
            file=sys.stderr,
        )
    print(json.dumps({"gemm_gflops": round(flops / 1e9), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
