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
from spalign.pipeline.judging import Judging, judging_step
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
from spalign.selfeval import cases_of, check_scorers, score_groups, score_responses
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


def sample_step(run: Context, base: str, policy: Policy, judging: Judging, prompts: list[Prompt], iteration: int) -> Step:
    """1-sample: n candidates a prompt."""
    config = run.config
    inputs = {
        "policy": policy.digest,
        "prompts": prompt_sets.sha256(prompts),
        "variants": [v.model_dump() for v in run.constitution.system_variants],
        "sample": config.sample.model_dump(),
        "engine": config.engine.matters(),
        "seed": config.seed,
        "iteration": iteration,
        "shard_size": config.shard_size,
    }
    stage = run.folder.stage(f"{base}/1-sample", inputs)

    def do() -> dict[str, Any]:
        check_scorers(judging.judge.engine.inner, run.objectives, judging.judgements())  # before anything is sampled
        if judging.judge is not policy:
            judging.judge.free()
        run.check_fit(policy, prompts)
        total = len(_left(stage, prompts, config.shard_size)) * config.sample.n
        with run.metered(policy, f"{base} sample", total, "responses") as engine:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                groups = sample(engine, shard, run.constitution, config.sample, seed=config.seed, purpose=f"{iteration}-candidate")
                return [group_to_json(g) for g in groups]

            return run_in_parts(stage, prompts, config.shard_size, work, tokens=lambda: engine.tokens)

    return Step("sample", stage, do)


def evaluate_step(run: Context, base: str, judging: Judging, config: RunConfig, sampled: Stage, *, name: str = "2-evaluate") -> Step:
    """2-evaluate: every finished candidate scored on every objective."""
    stage = run.folder.stage(f"{base}/{name}", {"from": sampled.digest, **judging.inputs, "shard_size": config.shard_size})

    def do() -> dict[str, Any]:
        judgements = judging.judgements()
        groups = _groups(sampled)
        total = sum(r.finished for g in _left(stage, groups, config.shard_size) for r in g.candidates)
        with run.metered(judging.judge, f"{base} evaluate", total, "responses") as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                scored = score_groups(engine.inner, shard, judging.objectives, judgements)
                engine.tick(sum(r.finished for g in shard for r in g.candidates))
                return [group_to_json(g) for g in scored]

            return run_in_parts(stage, groups, config.shard_size, work)

    return Step(name[2:], stage, do)


def refine_step(run: Context, base: str, policy: Policy, judging: Judging, config: RunConfig, scored: Stage) -> Step:
    """3-refine: drafts of a better response and of its placebo, scored like the rest; none where they could not save the prompt.

    Which draft is taken is decided in 4-denoise.
    """
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
        judgements, objectives = judging.judgements(), judging.resolved()
        groups = _groups(scored)
        kinds = 2 if config.refine.placebo else 1
        lost = {g.prompt.id for g in groups if hopeless(g, objectives)}
        left = [g for g in _left(stage, groups, config.shard_size) if g.prompt.id not in lost]
        total = len(left) * config.refine.drafts * kinds * 2
        with run.metered(policy, f"{base} refine", total, "drafts, written and scored") as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                worth = [g for g in shard if g.prompt.id not in lost]
                drafts = draft(engine, worth, run.constitution, config.refine, config.sample, seed=config.seed)
                cases = [case for g, d in zip(worth, drafts, strict=True) for case in cases_of(g, (*d.refined, *d.placebo))]
                scored_by_id = {r.id: r for r in score_responses(judging.judge.engine.inner, cases, objectives, judgements)}
                engine.tick(sum(len(d.refined) + len(d.placebo) for d in drafts))
                by_prompt = {g.prompt.id: d for g, d in zip(worth, drafts, strict=True)}
                return [_drafts_row(g.prompt.id, by_prompt.get(g.prompt.id, Drafts(())), scored_by_id) for g in shard]

            return run_in_parts(stage, groups, config.shard_size, work, tokens=lambda: engine.tokens)

    return Step("refine", stage, do)


def denoise_step(run: Context, base: str, judging: Judging, config: RunConfig, scored: Stage, refined: Stage) -> Step:
    """4-denoise: both criteria, one verdict a group."""
    stage = run.folder.stage(
        f"{base}/4-denoise", {"from": refined.digest, "levels": judging.levels, "denoise": config.denoise.model_dump()}
    )

    def do() -> dict[str, Any]:
        objectives = judging.resolved()
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


def pair_step(run: Context, base: str, policy: Policy, judging: Judging, config: RunConfig, denoised: Stage) -> Step:
    """5-pair: preference pairs in TRL's format, with the exact tokens, scores, margins and weights."""
    inputs = {
        "from": denoised.digest,
        "levels": judging.levels,
        "pairs": config.pairs.model_dump(),
        "alpha": config.train.alpha,
        "policy": policy.digest,
    }
    stage = run.folder.stage(f"{base}/5-pair", inputs)

    def do() -> dict[str, Any]:
        objectives = judging.resolved()
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


def data_steps(run: Context, base: str, policy: Policy, prompts: list[Prompt], iteration: int) -> tuple[list[Step], Judging]:
    """0 to 5 of an iteration under the run's recipe, and 2 to 5 under each recipe that it is compared with, on the same candidates."""
    judging, checked = judging_step(run, base, policy, run.config, first=iteration == 1)
    sampled = sample_step(run, base, policy, judging, prompts, iteration)
    steps = [*checked, sampled, *_from_candidates(run, base, policy, judging, run.config, sampled.stage)]
    for recipe in run.config.compare if iteration == 1 else ():
        other = run.config.with_recipe(recipe)
        other = other.model_copy(update={"refine": other.refine.model_copy(update={"placebo": False})})  # its yield is asked for, no more
        there = f"{base}/compare-{recipe}"
        how, check = judging_step(run, there, policy, other, first=True)
        steps += [*check, *_from_candidates(run, there, policy, how, other, sampled.stage)]
    return steps, judging


def _from_candidates(run: Context, base: str, policy: Policy, judging: Judging, config: RunConfig, sampled: Stage) -> list[Step]:
    scored = evaluate_step(run, base, judging, config, sampled)
    refined = refine_step(run, base, policy, judging, config, scored.stage)
    denoised = denoise_step(run, base, judging, config, scored.stage, refined.stage)
    return [scored, refined, denoised, pair_step(run, base, policy, judging, config, denoised.stage)]


def reference_steps(run: Context, base: str, sampled: Stage) -> list[Step]:
    """The same candidates scored by the reference judge, in its own best way: what the run's judge is compared with."""
    assert run.reference_judge is not None
    own = run.config.self_evaluation
    config = run.config.model_copy(update={"self_evaluation": own.model_copy(update={"judge_file": None, "allow_weak_judge": True})})
    there = f"{base}/reference"
    judging, checked = judging_step(run, there, run.reference_judge, config, first=True, judge=run.reference_judge)
    return [*checked, evaluate_step(run, there, judging, config, sampled)]


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


def _left(stage: Stage, items: Sequence[Item], size: int) -> list[Item]:
    """The items of an interrupted stage that are not on disk yet; what another input left there is set aside first."""
    stage.begin()
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
        "spreads": dict(response.spreads),
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
