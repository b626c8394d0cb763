"""summary.json: the facts of a run. Its schema is documented in docs/summary.md; `schema` counts up when a key changes its meaning."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import OUTLETS, PromptSource
from spalign.evaluation import Check, agreement, compare
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.evaluate import groups_of
from spalign.pipeline.gate import FAILED, lost
from spalign.pipeline.judging import Judging
from spalign.store import digest, read_json, versions
from spalign.types import Prompt

SCHEMA = 1
TRANSCRIPTS = 3


def summarise(run: Context, steps: Sequence[Step], policies: Sequence[Policy], judging: Judging) -> dict[str, Any]:
    """The summary of a finished run, from its manifests and the judged held-out answers."""
    done = {str(s.stage.folder.relative_to(run.folder.path)): s.stage.manifest() or {} for s in steps}
    key = digest([SCHEMA, run.config.on_record(), done])
    if (old := read_json(run.folder.path / "summary.json")) and old.get("digest") == key:
        return dict(old)
    own_pairs = [(w, m) for w, m in done.items() if w.endswith("/5-pair") and "/compare-" not in w]
    trained = [m for w, m in done.items() if w.endswith("/6-train")]
    before, after = (groups_of(next(s.stage for s in steps if s.name == f"evaluation-{w}-judge")) for w in ("before", "after"))
    names = [o.name for o in run.objectives]
    settings = run.config.evaluation
    comparison = compare(before, after, names, resamples=settings.bootstrap, seed=run.config.seed, gate=settings.gate)
    measures = comparison.to_json()
    folders = [s.stage.folder for s in steps if s.name == "train"]
    gate = _gate(done["evaluation/gate"]["gate"], folders)
    return {
        "schema": SCHEMA,
        "digest": key,
        "name": run.config.name,
        "model": run.config.model,
        "model_fingerprint": policies[0].digest,
        "model_path": None if lost(gate) else str(folders[-1] / "model"),
        "gate": gate,
        "constitution": {"name": run.constitution.name, "sha256": run.constitution.sha256(), "objectives": names},
        "recipe": run.config.recipe,
        "prompts": {
            "train": _prompts(run.config.prompts.train, run.train_prompts),
            "heldout": _prompts(run.config.prompts.heldout, run.heldout_prompts),
        },
        "seed": run.config.seed,
        "train": run.config.train.model_dump(mode="json", exclude=OUTLETS),
        "funnel": own_pairs[-1][1]["funnel"],
        "iterations": [
            {
                "funnel": pair["funnel"],
                "tau": done[where.replace("5-pair", "4-denoise")]["tau"],
                "consistency": done[where.replace("5-pair", "4-denoise")]["consistency"],
                "training": {k: train[k] for k in ("steps", "steps_kept", "collapsed", "prompts", "loss", "accuracy")},
            }
            for (where, pair), train in zip(own_pairs, trained, strict=True)
        ],
        "recipes": {
            recipe: {
                "funnel": done[f"iteration-1/compare-{recipe}/5-pair"]["funnel"],
                "consistency": done[f"iteration-1/compare-{recipe}/4-denoise"]["consistency"],
            }
            for recipe in run.config.compare
        },
        "judge": _judge(run, judging, policies[0]),
        "agreement": agreement_of(run, steps, judging),
        "scoring_share": _share(done),
        "evaluation": {o: measures[o]["all"] for o in names if "all" in measures[o]},
        "measures": measures,
        "unscored": comparison.unscored,
        "checks": [{"name": c.name, "passed": c.passed, "text": c.text} for c in (*comparison.checks, _training(trained))],
        "transcripts": _transcripts(before, after),
        "seconds": {where: m.get("seconds", 0.0) for where, m in done.items()},
        "tokens": {where: m["tokens"] for where, m in done.items() if m.get("tokens")},
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "versions": versions(),
    }


def _prompts(asked: PromptSource, prompts: Sequence[Prompt]) -> dict[str, Any]:
    source = prompt_sets.named(asked).source
    kind = "shipped" if source in prompt_sets.shipped_sets() else "file" if Path(source).exists() else "hub"
    return {"source": source, "kind": kind, "count": len(prompts), "sha256": prompt_sets.sha256(prompts)}


def _gate(facts: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, Any]:
    """What the gate found, with the folders of the model that failed and of the one that is proposed for it.

    folders: of every iteration's training. Earlier versions tried checkpoints of the last iteration alone, and noted no iteration.
    """
    proposed = None
    if found := next((c for c in facts["checkpoints"] if c["passed"]), None):
        iteration, step = found.get("iteration", len(folders)), found["step"]
        path = folders[iteration - 1] / ("model" if step is None else f"model-checkpoint-{step}")
        proposed = {"iteration": iteration, "step": step, "path": str(path)}
    return {**facts, "proposed": proposed, "failed_path": str(folders[-1] / f"model{FAILED}") if lost(facts) else None}


def _judge(run: Context, judging: Judging, policy: Policy) -> dict[str, Any]:
    """Who judged, how, and what the check said of it; figures are null where a scorer was named without a check."""
    named = run.config.self_evaluation.judge if run.named_judge is not policy else None
    return {
        "model": named or run.config.model,
        "independent": named is not None,
        "note": "a model other than the policy judges before and after"
        if named
        else "the frozen iteration-0 policy judges itself before and after",
        "objectives": {
            name: how.model_dump(mode="json", include={"scorer", "auc", "auc_ci", "on", "threshold", "injection_shift", "verdict"})
            for name, how in judging.judgements().items()
        },
    }


def agreement_of(run: Context, steps: Sequence[Step], judging: Judging) -> dict[str, Any] | None:
    """The run's judge against the reference judge on the first iteration's candidates; None where no reference is named."""
    own = run.config.self_evaluation
    if own.reference_judge is None:
        return None
    mine, theirs = (
        groups_of(next(s.stage for s in steps if str(s.stage.folder.relative_to(run.folder.path)) == f"iteration-1/{where}2-evaluate"))
        for where in ("", "reference/")
    )
    found = agreement(mine, theirs, judging.objectives, ddof=run.config.denoise.ddof, scale=run.config.denoise.scale)
    return {"reference": own.reference_judge, "scorers": [own.scorer, own.of_reference().scorer], **found}


def _share(done: Mapping[str, dict[str, Any]]) -> float | None:
    """Seconds of self-evaluation per second of sampling in the first iteration: what scoring the candidates costs."""
    sampling, scoring = (done.get(f"iteration-1/{w}", {}).get("seconds") for w in ("1-sample", "2-evaluate"))
    return scoring / sampling if sampling and scoring else None


def _training(trained: Sequence[dict[str, Any]]) -> Check:
    stopped = [f"{m['collapsed']} (step {m['steps']})" for m in trained if m["collapsed"]]
    return Check("training did not collapse", not stopped, "; ".join(stopped) or "every probe passed")


def _transcripts(before: Sequence[Any], after: Sequence[Any]) -> list[dict[str, str]]:
    """One prompt of each intent as far as there are, the first of each: not chosen by result."""
    intents: list[str] = list(dict.fromkeys(g.prompt.intent for g in before))
    chosen = [next(i for i, g in enumerate(before) if g.prompt.intent == intent) for intent in intents]
    chosen += [i for i in range(len(before)) if i not in chosen]
    return [
        {
            "id": before[i].prompt.id,
            "intent": before[i].prompt.intent,
            "prompt": before[i].prompt.text,
            "before": before[i].candidates[0].text,
            "after": after[i].candidates[0].text,
        }
        for i in chosen[:TRANSCRIPTS]
    ]
