"""From prompts to preference pairs: sample, self-evaluate, refine, denoise, pair; each a stage on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import RunConfig
from spalign.constitution import Objective
from spalign.pipeline.context import Context, Policy, Step
from spalign.preference import (
    Verdict,
    best,
    consistent_yield,
    denoise,
    hopeless,
    is_scored,
    make_pairs,
    resolve_tau,
    select_pairs,
    weights,
)
from spalign.rollout import Drafts, choose, draft, sample
from spalign.selfeval import CHOICES, check_scorers, score_groups, score_responses
from spalign.store import Item, Row, Stage, run_in_parts
from spalign.types import (
    DropReason,
    PreferencePair,
    Prompt,
    PromptGroup,
    Response,
    group_from_json,
    group_to_json,
    response_from_json,
)


def sample_step(run: Context, base: str, policy: Policy, prompts: list[Prompt], iteration: int) -> Step:
    """1-sample: n candidates a prompt."""
    config = run.config
    inputs = {
        "policy": policy.digest,
        "prompts": prompt_sets.sha256(prompts),
        "variants": [v.model_dump() for v in run.constitution.system_variants],
        "sample": config.sample.model_dump(),
        "engine": config.engine.model_dump(exclude={"batch_size"}),
        "seed": config.seed,
        "iteration": iteration,
        "shard_size": config.shard_size,
    }
    stage = run.folder.stage(f"{base}/1-sample", inputs)

    def do() -> dict[str, Any]:
        check_scorers(policy.engine, run.objectives, config.self_evaluation)
        if any(config.self_evaluation.scorer_of(o.name) == "yes_no" for o in run.objectives):
            policy.engine.check_choices(CHOICES)  # before anything is sampled
        run.check_fit(policy, prompts)
        total = len(_left(stage, prompts, config.shard_size)) * config.sample.n
        with run.metered(policy, f"{base} sample", total, "responses") as engine:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                groups = sample(engine, shard, run.constitution, config.sample, seed=config.seed, purpose=f"{iteration}-candidate")
                return [group_to_json(g) for g in groups]

            return run_in_parts(stage, prompts, config.shard_size, work, tokens=lambda: engine.tokens)

    return Step("sample", stage, do)


def evaluate_step(run: Context, base: str, policy: Policy, config: RunConfig, sampled: Stage) -> Step:
    """2-evaluate: every finished candidate scored on every objective."""
    objectives = _objectives(run, config)
    inputs = {"from": sampled.digest, "policy": policy.digest, **_asked(config, run), "shard_size": config.shard_size}
    stage = run.folder.stage(f"{base}/2-evaluate", inputs)

    def do() -> dict[str, Any]:
        groups = _groups(sampled)
        left = _left(stage, groups, config.shard_size)
        total = len(objectives) * sum(r.finished and bool(r.text.strip()) for g in left for r in g.candidates)
        with run.metered(policy, f"{base} evaluate", total, "scores") as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                return [group_to_json(g) for g in score_groups(engine, shard, objectives, config.self_evaluation)]

            return run_in_parts(stage, groups, config.shard_size, work, tokens=lambda: engine.tokens)

    return Step("evaluate", stage, do)


def refine_step(run: Context, base: str, policy: Policy, config: RunConfig, scored: Stage) -> Step:
    """3-refine: drafts of a better response and of its placebo, scored like the rest; none where they could not save the prompt.

    Which draft is taken is decided in 4-denoise.
    """
    objectives = _objectives(run, config)
    inputs = {
        "from": scored.digest,
        "policy": policy.digest,
        "refine": config.refine.model_dump(),
        "sample": config.sample.model_dump(),
        "constitution": {"good_system": run.constitution.good_system, "instruction": run.constitution.refine_instruction},
        "seed": config.seed,
    }
    stage = run.folder.stage(f"{base}/3-refine", inputs)

    def do() -> dict[str, Any]:
        groups = _groups(scored)
        kinds = 2 if config.refine.placebo else 1
        lost = {g.prompt.id for g in groups if hopeless(g, objectives)}
        left = [g for g in _left(stage, groups, config.shard_size) if g.prompt.id not in lost]
        total = len(left) * config.refine.drafts * kinds * (1 + len(objectives))
        with run.metered(policy, f"{base} refine", total, "responses and scores") as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                worth = [g for g in shard if g.prompt.id not in lost]
                drafts = draft(engine, worth, run.constitution, config.refine, config.sample, seed=config.seed)
                finished = [(g.prompt, r) for g, d in zip(worth, drafts, strict=True) for r in (*d.refined, *d.placebo) if r.finished]
                scored_by_id = {r.id: r for r in score_responses(engine, finished, objectives, config.self_evaluation)}
                by_prompt = {g.prompt.id: d for g, d in zip(worth, drafts, strict=True)}
                return [_drafts_row(g.prompt.id, by_prompt.get(g.prompt.id, Drafts(())), scored_by_id) for g in shard]

            return run_in_parts(stage, groups, config.shard_size, work, tokens=lambda: engine.tokens)

    return Step("refine", stage, do)


def denoise_step(run: Context, base: str, config: RunConfig, scored: Stage, refined: Stage) -> Step:
    """4-denoise: both criteria, one verdict a group."""
    objectives = _objectives(run, config)
    stage = run.folder.stage(
        f"{base}/4-denoise", {"from": refined.digest, "levels": _levels(objectives), "denoise": config.denoise.model_dump()}
    )

    def do() -> dict[str, Any]:
        stage.begin()
        drafts = {row["prompt_id"]: row for row in refined.rows()}
        pick = partial(_best_scored, objectives=objectives)
        groups = [choose(g, _drafts(drafts[g.prompt.id]), pick) for g in _groups(scored)]
        verdicts = denoise(groups, objectives, config.denoise)
        stage.write_part(0, [_verdict_row(v) for v in verdicts])
        dets = [v.det for v in verdicts if v.det is not None and (v.kept or v.reason is DropReason.UNSTABLE)]
        of = {kind: consistent_yield(groups, objectives, config.denoise, of=kind) for kind in ("refined", "placebo")}
        return stage.finish(
            groups=len(verdicts),
            kept=sum(v.kept for v in verdicts),
            dropped=dict(Counter(str(v.reason) for v in verdicts if v.reason)),
            tau=resolve_tau(dets, config.denoise) if dets else None,
            consistency={kind: {"passed": passed, "tested": tested} for kind, (passed, tested) in of.items()},
        )

    return Step("denoise", stage, do)


def pair_step(run: Context, base: str, policy: Policy, config: RunConfig, denoised: Stage) -> Step:
    """5-pair: preference pairs in TRL's format, with the exact tokens, scores, margins and weights."""
    objectives = _objectives(run, config)
    inputs = {
        "from": denoised.digest,
        "levels": _levels(objectives),
        "pairs": config.pairs.model_dump(),
        "alpha": config.train.alpha,
        "policy": policy.digest,
    }
    stage = run.folder.stage(f"{base}/5-pair", inputs)

    def do() -> dict[str, Any]:
        stage.begin()
        rows = list(denoised.rows())
        kept = [group_from_json(r["group"]) for r in rows if r["reason"] is None]
        selection = select_pairs([make_pairs(g, objectives, config.pairs) for g in kept], config.pairs)
        pairs = [p for of_group in selection.pairs for p in of_group]
        weight = weights([p.gap for p in pairs], config.train.alpha) if pairs else []
        stage.write_part(0, [pair_row(p, w, policy.engine.encode_chat(p.prompt.messages)) for p, w in zip(pairs, weight, strict=True)])
        dropped = Counter(r["reason"] for r in rows if r["reason"])
        if without := sum(not of_group for of_group in selection.pairs):
            dropped[str(DropReason.BELOW_MARGIN)] = without
        responses = [r for row in rows for r in row["group"]["candidates"]]
        return stage.finish(
            funnel={
                "prompts": len(rows),
                "kept": len(rows) - sum(dropped.values()),
                "pairs": len(pairs),
                "dropped": dict(sorted(dropped.items())),
                "responses": {
                    "candidates": len(responses),
                    "unfinished": sum(not r["finished"] for r in responses),
                    "empty": sum(not r["text"].strip() for r in responses),
                },
                "pairs_removed": {"above the cap": selection.capped, "to balance length": selection.unbalanced},
                "decided_by": dict(Counter(p.decided_by for p in pairs)),
                "winner_shorter": sum(len(p.chosen.token_ids) < len(p.rejected.token_ids) for p in pairs),
            }
        )

    return Step("pair", stage, do)


def data_steps(run: Context, base: str, policy: Policy, prompts: list[Prompt], iteration: int) -> list[Step]:
    """1 to 5 of an iteration under the run's recipe, and 2 to 5 under each recipe that it is compared with, on the same candidates."""
    sampled = sample_step(run, base, policy, prompts, iteration)
    steps = [sampled, *_from_candidates(run, base, policy, run.config, sampled.stage)]
    for recipe in run.config.compare if iteration == 1 else ():
        other = run.config.with_recipe(recipe)
        other = other.model_copy(update={"refine": other.refine.model_copy(update={"placebo": False})})  # its yield is asked for, no more
        steps += _from_candidates(run, f"{base}/compare-{recipe}", policy, other, sampled.stage)
    return steps


def _from_candidates(run: Context, base: str, policy: Policy, config: RunConfig, sampled: Stage) -> list[Step]:
    scored = evaluate_step(run, base, policy, config, sampled)
    refined = refine_step(run, base, policy, config, scored.stage)
    denoised = denoise_step(run, base, config, scored.stage, refined.stage)
    return [scored, refined, denoised, pair_step(run, base, policy, config, denoised.stage)]


def pair_row(pair: PreferencePair, weight: float, prompt_ids: list[int]) -> Row:
    """A pair as a row of TRL's conversational preference format, with extra columns."""
    return {
        "id": pair.id,
        "prompt_id": pair.prompt.id,
        "topic": pair.prompt.topic,
        "intent": pair.prompt.intent,
        "prompt": [{"role": m.role, "content": m.content} for m in pair.prompt.messages],
        "chosen": [{"role": "assistant", "content": pair.chosen.text}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text}],
        "scores_chosen": dict(pair.chosen.scores),
        "scores_rejected": dict(pair.rejected.scores),
        "margin": pair.margin,
        "gap": pair.gap,
        "weight": weight,
        "decided_by": pair.decided_by,
        "prompt_ids": prompt_ids,
        "chosen_ids": list(pair.chosen.token_ids),
        "rejected_ids": list(pair.rejected.token_ids),
    }


def _objectives(run: Context, config: RunConfig) -> Any:
    return run.objectives if config is run.config else config.constitution_for_run().objectives


def _levels(objectives: Sequence[Any]) -> list[Any]:
    return [[o.name, o.threshold, o.resolution] for o in objectives]


def _asked(config: RunConfig, run: Context) -> dict[str, Any]:
    """What the scores depend on: how each objective is asked about, not what is made of the scores."""
    return {
        "objectives": [o.model_dump(exclude={"threshold", "resolution"}) for o in run.objectives],
        "scorers": {o.name: config.self_evaluation.scorer_of(o.name) for o in run.objectives},
    }


def _left(stage: Stage, items: Sequence[Item], size: int) -> list[Item]:
    """The items of an interrupted stage that are not on disk yet."""
    return [item for n, s in enumerate(range(0, len(items), size)) if not stage.part(n).exists() for item in items[s : s + size]]


def _groups(stage: Stage) -> list[PromptGroup]:
    return [group_from_json(row) for row in stage.rows()]


def _best_scored(drafts: Sequence[Response], *, objectives: Sequence[Objective]) -> Response:
    """The best draft that is scored on every objective, else the first, which is then dropped as unscored."""
    scored = [r for r in drafts if is_scored(r, objectives)]
    return best(scored, objectives) if scored else drafts[0]


def _response_row(response: Any) -> Row:
    return {
        **{f: getattr(response, f) for f in ("id", "text", "finished", "system")},
        "token_ids": list(response.token_ids),
        "scores": dict(response.scores),
    }


def _drafts(row: Row) -> Drafts:
    return Drafts(*(tuple(r for r in map(response_from_json, row[kind]) if r) for kind in ("refined", "placebo")))


def _drafts_row(prompt_id: str, drafts: Drafts, scored: Mapping[str, Response]) -> Row:
    sides = {"refined": drafts.refined, "placebo": drafts.placebo}
    return {"prompt_id": prompt_id, **{k: [_response_row(scored.get(r.id, r)) for r in v] for k, v in sides.items()}}


def _verdict_row(v: Verdict) -> Row:
    return {
        "prompt_id": v.group.prompt.id,
        "reason": str(v.reason) if v.reason else None,
        "det": v.det,
        "detail": v.detail,
        "group": group_to_json(v.group),
    }
