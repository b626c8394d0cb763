"""What self-evaluation costs beside sampling, in one run: two objectives, transformers engine, with and without shared prefixes.

    python benchmarks/scoring.py [--model demo] [--prompts 36] [--scorer NAME ...]

Samples four answers a prompt as configs/demo.yaml does, then scores them with each scorer, twice: as it is, and with every text run through
the model by itself. Prints a line a scorer, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import spalign.engines.transformers as engine_module
from spalign import prompts as prompt_sets
from spalign.config import load_config
from spalign.constitution import load_constitution
from spalign.engines.transformers import TransformersEngine
from spalign.rollout import sample
from spalign.selfeval import PROBE, SCORERS, cases_of, is_relative
from spalign.selfeval.probe import representations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=36)
    parser.add_argument("--scorer", nargs="+", default=[PROBE, *(n for n in SCORERS if not is_relative(n) and n != "likert")])
    args = parser.parse_args()
    config = load_config("configs/demo.yaml", (f"prompts.train.limit={args.prompts}",))
    constitution = load_constitution(config.constitution)
    engine = TransformersEngine.load(args.model, config.engine)
    prompts = prompt_sets.load_prompts(config.prompts.train, config.prompts)
    sample(engine, prompts[:4], constitution, config.sample, seed=1, purpose="warm-up")
    began = time.perf_counter()
    groups = sample(engine, prompts, constitution, config.sample, seed=0, purpose="benchmark")
    sampling = time.perf_counter() - began
    cases = [c for g in groups for c in cases_of(g, g.candidates)]
    out: dict[str, Any] = {"model": args.model, "answers": len(cases), "sampling_s": round(sampling, 2), "scorers": {}}
    shared_from = engine_module._SHARE_FROM
    for name in args.scorer:
        seconds = {}
        for how, least in (("shared", shared_from), ("alone", 1 << 30)):
            engine_module._SHARE_FROM = least
            began = time.perf_counter()
            if name != PROBE:
                SCORERS[name].score(engine, cases, constitution.objectives)
            else:
                for _ in constitution.objectives if how == "alone" else "1":  # one reading serves all objectives
                    representations(engine, cases)
            seconds[how] = time.perf_counter() - began
        engine_module._SHARE_FROM = shared_from
        out["scorers"][name] = {
            "share_of_sampling": round(seconds["shared"] / sampling, 3),
            "share_without_sharing": round(seconds["alone"] / sampling, 3),
            "seconds": round(seconds["shared"], 2),
        }
        print(f"{name:16} {out['scorers'][name]}", flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
