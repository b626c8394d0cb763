"""Sampling on this machine, everything in one run: the vLLM engine, plain `generate` in batches, raw vLLM, and the whole sample stage.

    python benchmarks/generation.py [--model demo] [--prompts 108] [--rounds 5] [--json]

The requests are those of configs/demo.yaml: its prompts, samples a prompt, lengths. Compared are generated tokens a second (the end of
sequence counts, padding does not), each the median of the rounds, which alternate; overheads are medians of the rounds' ratios. Raw vLLM
is `LLM.generate` on the same token ids in a process of its own: with vLLM's own sampling, without seeds, and with the sampler that spalign
gives it, which shows what the stage adds to the very same work. The stage is spalign's own code with its part files and journals. Needs
vLLM: make setup ENGINE=vllm.

Last line: vllm_speedup (over generate), overhead (of the stage over raw vLLM with the same sampler), overhead_own_sampling (over raw vLLM
as it comes), scoring_share (yes_no on both objectives, of the stage's sampling), prefix_reuse (share of the prompts' tokens that did not
run, in sampling and in scoring), and tokens a second of each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spalign import prompts as prompt_sets
from spalign.config import EngineConfig, RunConfig, load_config
from spalign.constitution import Constitution, load_constitution
from spalign.engines.loading import inference_dtype, load_model
from spalign.engines.models import resolve
from spalign.engines.vllm import VLLMEngine, _environment, _settings
from spalign.pipeline.context import MeteredEngine
from spalign.rollout import sample
from spalign.selfeval import SCORERS, cases_of
from spalign.store import Stage, run_in_parts
from spalign.types import Prompt, group_to_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=108)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--generate-batch", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="Only the last line.")
    parser.add_argument("--raw", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.raw:
        raw_process(Path(args.raw))
        return
    config = load_config("configs/demo.yaml", (f"prompts.train.limit={args.prompts}", "engine.kind=vllm", f"model={args.model}"))
    constitution = load_constitution(config.constitution)
    prompts = prompt_sets.load_prompts(config.prompts.train, config.prompts)
    engine = VLLMEngine(args.model, config.engine)
    asked = token_ids(engine, prompts, constitution, config)
    with RawVLLM(args.model, config, asked) as raw:
        stage = StageRounds(engine, prompts, constitution, config)
        stage.round(prompts[:8])  # warm-up
        rates: dict[str, list[float]] = {"raw": [], "raw_own_sampling": [], "stage": []}
        for n in range(args.rounds):
            rates["raw"].append(raw.round("same", n))
            rates["raw_own_sampling"].append(raw.round("own", n))
            rates["stage"].append(stage.round(prompts))
    reuse = engine.cached_tokens / engine.prompt_tokens
    scoring, reuse_scoring = score(engine, stage.groups, constitution)
    engine.close()
    plain = generate(args.model, config, asked, args.generate_batch)
    typical = {name: statistics.median(values) for name, values in rates.items()}

    def overhead(raw: str) -> float:
        """Round by round, as the machine's speed drifts."""
        return round(statistics.median(a / b for a, b in zip(rates[raw], rates["stage"], strict=True)) - 1, 3)

    out = {
        "vllm_speedup": round(typical["stage"] / plain, 2),
        "overhead": overhead("raw"),
        "overhead_own_sampling": overhead("raw_own_sampling"),
        "scoring_share": round(scoring / stage.seconds, 3),
        "prefix_reuse": round(reuse, 3),
        "prefix_reuse_scoring": round(reuse_scoring, 3),
        "tokens_per_second": {
            "generate": round(plain),
            "raw_vllm": round(typical["raw"]),
            "raw_vllm_own_sampling": round(typical["raw_own_sampling"]),
            "sample_stage": round(typical["stage"]),
        },
        "rounds": {name: [round(v) for v in values] for name, values in rates.items()},
        "prompts": len(prompts),
        "samples": len(asked),
        "shard_size": config.shard_size,
        "threads": torch.get_num_threads(),
    }
    if not args.json:
        for name, value in out.items():
            print(f"{name:20} {value}")
    print(json.dumps(out))


def token_ids(engine: VLLMEngine, prompts: Sequence[Prompt], constitution: Constitution, config: RunConfig) -> list[list[int]]:
    """A prompt's ids for every sample, as the stage asks for them."""
    variants = constitution.system_variants
    return [engine.encode_chat(p.with_system(variants[i % len(variants)].text)) for p in prompts for i in range(config.sample.n)]


class StageRounds:
    """The sample stage as the pipeline runs it, with an engine that is there."""

    def __init__(self, engine: VLLMEngine, prompts: Sequence[Prompt], constitution: Constitution, config: RunConfig) -> None:
        self.engine, self.constitution, self.config = engine, constitution, config
        self.groups: list[Any] = []
        self.seconds, self._count = 0.0, 0

    def round(self, prompts: Sequence[Prompt]) -> float:
        """Tokens a second, best of the rounds in `seconds`."""
        self._count += 1
        self.groups = []

        with tempfile.TemporaryDirectory() as folder:
            stage = Stage(Path(folder) / "1-sample", {})
            engine = MeteredEngine(self.engine, "benchmark", stage)

            def work(shard: Sequence[Prompt]) -> list[dict[str, Any]]:
                made = sample(engine, shard, self.constitution, self.config.sample, seed=self._count, purpose="benchmark")
                self.groups += made
                return [group_to_json(g.replace(prompt_ids=tuple(engine.encode_chat(g.prompt.messages)))) for g in made]

            began = time.perf_counter()
            run_in_parts(stage, prompts, self.config.shard_size, work, crew=engine)
            seconds = time.perf_counter() - began
        self.seconds = min(self.seconds, seconds) if self._count > 2 else seconds  # the first was the warm-up
        return sum(len(r.token_ids) for g in self.groups for r in g.candidates) / seconds


def score(engine: VLLMEngine, groups: Sequence[Any], constitution: Constitution) -> tuple[float, float]:
    """Seconds, and the share of tokens that did not run."""
    cases = [c for g in groups for c in cases_of(g, g.candidates)]
    before = engine.prompt_tokens, engine.cached_tokens
    began = time.perf_counter()
    SCORERS["yes_no"].score(engine, cases, constitution.objectives)
    seconds = time.perf_counter() - began
    return seconds, (engine.cached_tokens - before[1]) / max(1, engine.prompt_tokens - before[0])


class RawVLLM:
    """`LLM.generate` on the same ids, in a process of its own; a round a line."""

    def __init__(self, model: str, config: RunConfig, asked: list[list[int]]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        own = config.sample
        settings = _settings(resolve(model), config.engine)
        job = {"settings": settings, "ids": asked, "sampling": [own.temperature, own.top_p, own.max_new_tokens]}
        path = Path(self._folder.name) / "job.json"
        path.write_text(json.dumps(job))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--raw", str(path)],
            env=_environment(config.engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> RawVLLM:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def round(self, sampler: str, number: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sampler} {number}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("rate "):
                return float(line.split()[1])
        raise SystemExit("raw vLLM ended by itself")


def raw_process(path: Path) -> None:
    from vllm import LLM, SamplingParams

    from spalign.engines.vllm_sampler import ARGUMENT

    job = json.loads(path.read_text())
    temperature, top_p, limit = job["sampling"]
    llm = LLM(**job["settings"])
    eos = json.loads(Path(job["settings"]["model"], "config.json").read_text())["eos_token_id"]
    alike = {"max_tokens": limit, "stop_token_ids": [eos], "detokenize": False}
    own = SamplingParams(temperature=temperature, top_p=top_p, **alike)

    def seeded(seed: int) -> SamplingParams:
        return SamplingParams(temperature=0, extra_args={ARGUMENT: [seed, temperature, top_p, limit]}, **alike)

    def once(ids: list[list[int]], how: list[str]) -> float:
        sampler, number = how
        params = [own if sampler == "own" else seeded(int(number) * len(ids) + n) for n in range(len(ids))]
        began = time.perf_counter()
        made = llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
        return sum(len(m.outputs[0].token_ids) for m in made) / (time.perf_counter() - began)

    print("rate", once(job["ids"][:32], ["same", "99"]), flush=True)
    while line := sys.stdin.readline():
        print("rate", once(job["ids"], line.split()), flush=True)


@torch.inference_mode()
def generate(model_name: str, config: RunConfig, asked: list[list[int]], batch: int) -> float:
    """Tokens a second of transformers' `generate`, prompts of like length together."""
    engine = EngineConfig(dtype=config.engine.dtype, device=config.engine.device)
    model, tokenizer = load_model(model_name, engine, dtype=inference_dtype(engine))
    model.eval()
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ordered = sorted(asked, key=len)
    own = config.sample

    def once(rows: list[list[int]]) -> int:
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=0,
            max_new_tokens=own.max_new_tokens,
            pad_token_id=pad,
        )[:, width:]
        return sum(row.index(eos) + 1 if eos in row else len(row) for row in made.tolist())

    once(ordered[:8])
    began = time.perf_counter()
    tokens = sum(once(ordered[i : i + batch]) for i in range(0, len(ordered), batch))
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
