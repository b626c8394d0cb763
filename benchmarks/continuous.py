"""Transformers side by side: continuous batching, static batches by length, and plain `generate`, on the same requests in one process.

    python benchmarks/continuous.py [--model demo | --shape llama-8b] [--device cuda] [--requests 256] [--batch 128] [--longest 384]

Answers end at lengths that are drawn beforehand (log-normal, as answers are: most are short, a few go on to the longest), the same for
all three, so that random weights serve: `generate` is told by a stopping criterion, a row at a time, as an end of sequence would. Weights
are bf16. Counted are generated tokens a second up to those lengths; `generate` takes prompts of like length together, as many as a batch.
With --masked, continuous batching runs once more with the attention that transformers takes where flash attention is not there.

Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from train_step import SHAPES
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, StoppingCriteria, StoppingCriteriaList

from spalign.engines import continuous
from spalign.engines.attention import register
from spalign.engines.base import Completion, GenerateRequest, Sampling
from spalign.engines.continuous import ContinuousEngine
from spalign.engines.models import resolve
from spalign.engines.transformers import TransformersEngine
from spalign.types import Message

TEMPERATURE, TOP_P = 1.0, 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the model's tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--masked", action="store_true", help="also with a mask of all tokens against all")
    parser.add_argument("--json", action="store_true", help="only the last line")
    args = parser.parse_args()
    model, tokenizer = load(args)
    asked = requests(args)
    engines = {"continuous": ContinuousEngine(model, tokenizer, batch_size=args.batch)}
    engines["static"] = TransformersEngine(model, tokenizer, batch_size=args.batch)
    for engine in engines.values():
        engine.tokens.eos = frozenset()  # lengths are those that were drawn
    lengths = [r.sampling.max_new_tokens for r in asked]
    ways: dict[str, Callable[[], list[int]]] = {
        "continuous": lambda: drain(engines["continuous"], asked),
        "generate": lambda: generate(model, tokenizer, engines["static"], asked, args),
        "static": lambda: drain(engines["static"], asked),
    }
    if args.masked:
        ways["continuous_masked"] = lambda: masked(lambda: drain(engines["continuous"], asked))
    out: dict[str, Any] = {}
    for name, way in ways.items():
        drain(engines["static"], asked[:2])
        if args.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made = way()
        seconds = time.perf_counter() - began
        assert sorted(made) == sorted(lengths), name
        out[name] = {"tokens_per_second": round(sum(made) / seconds), "seconds": round(seconds, 1)}
        if args.device != "cpu":
            out[name]["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if not args.json:
            print(name, out[name], flush=True)
    rate = {name: found["tokens_per_second"] for name, found in out.items()}
    out |= {f"{name}_over_generate": round(rate[name] / rate["generate"], 2) for name in rate if name != "generate"}
    out |= {"attention": continuous._attention(model), "device": args.device, "tokens": sum(lengths), "longest": max(lengths)}
    print(json.dumps(out))


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    where = resolve(args.model)
    tokenizer = AutoTokenizer.from_pretrained(where)
    if not args.shape:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, attn_implementation=register())
        return model.to(args.device).eval(), tokenizer
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[args.shape], attn_implementation=register()), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # a few likely tokens, not the whole vocabulary
    return model.eval(), tokenizer


def requests(args: argparse.Namespace) -> list[GenerateRequest]:
    rng = random.Random(0)
    found = []
    for n in range(args.requests):
        length = min(args.longest, max(8, round(rng.lognormvariate(0, 0.8) * args.longest / 4)))
        text = " ".join(rng.choices(("please", "tell", "me", "more", "about", "rivers", "and", "stones"), k=rng.randint(20, 120)))
        found.append(GenerateRequest(str(n), (Message("user", text),), (n,), Sampling(TEMPERATURE, TOP_P, length)))
    return found


def drain(engine: TransformersEngine, asked: list[GenerateRequest]) -> list[int]:
    """Lengths of the answers. Static batches do not know them beforehand, as nobody does: their order is that of the prompts."""
    if isinstance(engine, ContinuousEngine):
        return [len(c.token_ids) for c in engine.generate(asked)]
    work = sorted(engine._work(asked), key=lambda w: len(w[0]))
    made: list[Completion] = []
    with torch.inference_mode():
        for i in range(0, len(work), engine.batch_size):
            made += engine._generate_batch(work[i : i + engine.batch_size])
    return [len(c.token_ids) for c in made]


class Drawn(StoppingCriteria):  # type: ignore[misc]
    """A row ends at its own length."""

    def __init__(self, width: int, lengths: list[int], device: str) -> None:
        self.ends = torch.tensor(lengths, device=device) + width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.ends


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, engine: TransformersEngine, asked: list[GenerateRequest], args: argparse.Namespace) -> list[int]:
    work = sorted(engine._work(asked), key=lambda w: len(w[0]))
    pad = tokenizer.pad_token_id
    model.set_attn_implementation("sdpa")  # as it comes
    made = []
    for i in range(0, len(work), args.batch):
        some = work[i : i + args.batch]
        width, lengths = max(len(ids) for ids, _, _ in some), [r.sampling.max_new_tokens for _, r, _ in some]
        ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids, _, _ in some], device=args.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _, _ in some], device=args.device)
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, pad_token_id=pad,
            eos_token_id=None, max_new_tokens=max(lengths), stopping_criteria=StoppingCriteriaList([Drawn(width, lengths, args.device)]),
        )  # fmt: skip
        made += [min(length, out.shape[1] - width) for length in lengths]
    model.set_attn_implementation(register())
    return made


def masked(way: Callable[[], list[int]]) -> list[int]:
    chosen = continuous._attention
    continuous._attention = lambda _: "sdpa"  # type: ignore[assignment]
    try:
        return way()
    finally:
        continuous._attention = chosen


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
