"""One optimiser step's forward and backward pass: spalign against TRL's CPOTrainer (SimPO) on identical pairs.

    python benchmarks/train_step.py --json [--model demo | --shape llama-8b] [--device cpu] [--k 5 9] [--lora] [--response 200]
        [--attention flex]

All K(K-1)/2 pairs of K responses to a prompt. Each side has a process of its own, so that its peak memory is its own; the processes take
turns and the quickest step of each counts. All weights are bf16 (in a run those that are trained are float32, under autocast); adapters are
float32 and work under bf16 autocast, as in a run. FLOPs are those that the pairs need when each prompt and response is run once, without
anything that is computed twice. The gradients are compared in float32 (`--no-exact` leaves that out).

Prints a line a K, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

SHAPES = {
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--k", type=int, nargs="+", default=[5, 9])
    parser.add_argument("--prompts", type=int, default=2, help="prompts in the step, in one forward pass")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=200, help="tokens of a response: 0.8 to 1.2 times this")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--attention", choices=("rows", "flex"), default="rows", help="spalign's, over a packed row")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps a process, the quickest counts")
    parser.add_argument("--trl-batch", type=int, default=20, help="most pairs in one forward pass of TRL's")
    parser.add_argument("--no-exact", action="store_true")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the last line always is JSON")
    parser.add_argument("--role", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        print(json.dumps(one_side(args)))
        return
    peak = gemm_peak(args.device)
    out: dict[str, Any] = {}
    for k in args.k:
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for _ in range(args.rounds):
            for role, rows in runs.items():
                rows.append(_process(args, k, role))
                print(f"k={k} {role}: {rows[-1]}", file=sys.stderr, flush=True)
        ours, theirs = (min(rows, key=lambda r: r["seconds"]) for rows in runs.values())
        row = {
            "speedup": theirs["seconds"] / ours["seconds"],
            "memory_ratio": ours["peak_gb"] / theirs["peak_gb"],
            "gradient_difference": None if args.no_exact else _difference(args, k),
            "tokens_per_second": ours["tokens"] / ours["seconds"],
            "gemm_share": ours["flops"] / ours["seconds"] / peak,
            "seconds": ours["seconds"], "seconds_trl": theirs["seconds"], "peak_gb": ours["peak_gb"], "peak_gb_trl": theirs["peak_gb"],
            "loss": ours["loss"], "loss_trl": theirs["loss"],
        }  # fmt: skip
        out[f"k{k}"] = {n: round(v, 9 if n == "gradient_difference" else 3) if isinstance(v, float) else v for n, v in row.items()}
        print(f"K={k}: {out[f'k{k}']}", flush=True)
    out["gemm_peak_gflops"] = round(peak / 1e9)
    print(json.dumps(out))


def _process(args: argparse.Namespace, k: int, role: str, **changes: Any) -> dict[str, Any]:
    options = {**vars(args), "k": k, "role": role, **changes}
    command = [sys.executable, __file__]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [] if value in (False, None) else [flag, str(value)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def _difference(args: argparse.Namespace, k: int) -> float:
    """Relative difference of the two gradients in float32, one prompt, the same lengths."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        for role in ("ours", "theirs"):
            _process(args, k, role, dtype="float32", prompts=1, steps=1, trl_batch=min(args.trl_batch, 8), gradient=Path(folder) / role)
        ours, theirs = (load_file(Path(folder) / role) for role in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    gap = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in ours)
    return float((gap / sum(float(t.double().square().sum()) for t in theirs.values())) ** 0.5)


def gemm_peak(device: str) -> float:
    """FLOP/s of the best of several bf16 matrix products."""
    import torch

    best = 0.0
    for n in (2048, 4096) if device == "cpu" else (8192, 16384):
        a, b = (torch.randn(n, n, device=device).bfloat16() for _ in "ab")
        for _ in range(5):
            _sync(device)
            began = time.perf_counter()
            a @ b
            _sync(device)
            best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def _sync(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """Times steps of one side in this process; the first of several is the warm-up."""
    model, tokenizer = load(args)
    rows = data(tokenizer, args, args.k[0], args.prompts)
    step, groups = (ours if args.role == "ours" else theirs)(args, model, tokenizer, rows)
    out = timed(args, model, step)
    if args.gradient:
        from safetensors.torch import save_file

        save_file({n: p.grad.contiguous() for n, p in model.named_parameters() if p.grad is not None}, args.gradient)
    return {**out, **(needed(model, groups, args.lora) if groups else {})}


def timed(args: argparse.Namespace, model: Any, step: Any) -> dict[str, Any]:
    """The quickest step, the process's peak memory (on a GPU that of these steps), and the loss."""
    import torch

    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        model.zero_grad()
        _sync(args.device)
        began = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.lora and args.dtype == "bfloat16"):
            loss = step()
        _sync(args.device)
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if args.device == "cpu" else torch.cuda.max_memory_allocated()
    return {"seconds": min(seconds), "peak_gb": peak / 1e9, "loss": loss}


def needed(model: Any, groups: list[Any], lora: bool) -> dict[str, Any]:
    """FLOPs: 6 a weight and token (4 where it is frozen), the head at response tokens only, causal attention."""
    config = model.config
    embeddings = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    body = sum(p.numel() for n, p in model.named_parameters() if id(p) not in embeddings and "lora_" not in n)
    tokens = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    answers = sum(len(r) for g in groups for r in g.responses)
    sees = sum(len(g.prompt) ** 2 / 2 + sum(len(r) * (len(g.prompt) + len(r) / 2) for r in g.responses) for g in groups)
    flops = (4 if lora else 6) * (body * tokens + config.vocab_size * config.hidden_size * answers)
    return {"tokens": tokens, "flops": flops + 3 * 4 * config.hidden_size * config.num_hidden_layers * sees}


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from spalign.engines.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(args.model))
    dtype = getattr(torch, args.dtype)
    if args.shape:
        torch.manual_seed(0)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[args.shape]), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(resolve(args.model), dtype=dtype).to(args.device)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        if args.role == "ours":
            from spalign.training.batches import prepare

            prepare(model, args.attention)
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        if args.role == "ours":
            from spalign.training.adapters import fuse_adapters

            fuse_adapters(model)
    return model.train(), tokenizer


def data(tokenizer: Any, args: argparse.Namespace, k: int, prompts: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every pair of k random answers, as text whose tokens are known: words that are one token each."""
    rng = random.Random(seed)
    words = [w for i in range(2000, 12000) if (w := tokenizer.decode([i]))[:1] == " " and w[1:].isalpha() and w.isascii()]
    words = [w for w in words if len(tokenizer(w, add_special_tokens=False)["input_ids"]) == 1]
    rows = []
    for _ in range(prompts):
        prompt = "".join(rng.choices(words, k=args.prompt))
        lengths = [round(args.response * rng.uniform(0.8, 1.2)) for _ in range(k)]
        answers = ["".join(rng.choices(words, k=n)) for n in lengths]
        # TRL puts a BOS before every prompt, also for tokenizers that do not: so do these token ids, which it does not read
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        rows += [{"prompt": prompt, "prompt_ids": ids, "chosen": a, "rejected": b} for i, a in enumerate(answers) for b in answers[i + 1 :]]
    return rows


def ours(args: argparse.Namespace, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    import torch

    from spalign.training.trainer import SPAConfig, SPATrainer

    config = SPAConfig(
        output_dir=tempfile.mkdtemp(), loss="simpo", use_cpu=args.device == "cpu", report_to="none", bf16=False,
        per_device_train_batch_size=args.prompts, attention=args.attention,
    )  # fmt: skip
    inner = model.get_base_model() if args.lora else model
    trainer = SPATrainer(inner, config, rows, tokenizer)
    batches = [trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))]

    def step() -> float:
        got, _ = trainer.get_batch_samples(iter(batches), 1, torch.device(args.device))
        loss = trainer.compute_loss(model, got[0])
        loss.backward()
        return float(loss.detach())

    return step, list(trainer.train_dataset)


def theirs(args: argparse.Namespace, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="simpo", cpo_alpha=0.0, alpha=0.0, beta=2.5, simpo_gamma=1.0, use_cpu=args.device == "cpu",
        bf16=False, gradient_checkpointing=False, per_device_train_batch_size=args.trl_batch, report_to="none", disable_tqdm=True,
        max_length=8192, dataloader_drop_last=False,
    )  # fmt: skip
    trainer = CPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{n: r[n] for n in ("prompt", "chosen", "rejected")} for r in rows]),
        processing_class=tokenizer,
    )
    batches = [trainer._prepare_inputs(b) for b in trainer.get_train_dataloader()]

    def step() -> float:
        total = 0.0
        for batch in batches:
            loss, _ = trainer.get_batch_loss_metrics(model, batch)
            loss = loss * len(batch["chosen_input_ids"]) / len(rows)
            loss.backward()
            total += float(loss.detach())
        return total

    return step, []


if __name__ == "__main__":
    main()
