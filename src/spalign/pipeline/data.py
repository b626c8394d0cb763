"""From prompts to scored candidates and drafts: sample, self-evaluate, refine; each a stage on disk. What follows is in `pairing`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import RunConfig
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.judging import Judging, judging_step
from spalign.pipeline.pairing import denoise_step, pair_step
from spalign.preference import hopeless
from spalign.rollout import Drafts, draft, sample
from spalign.selfeval import cases_of, check_scorers, score_groups, score_responses
from spalign.store import Row, Stage, decode_row, run_in_parts, run_over_parts
from spalign.types import Prompt, PromptGroup, Response, group_from_json, group_to_json, response_to_json


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
    stage = run.folder.stage(f"{base}/1-sample", inputs, policy.made_by)

    def do() -> dict[str, Any]:
        check_scorers(judging.judge.engine.inner, run.objectives, judging.judgements())  # before anything is sampled
        if judging.judge is not policy:
            judging.judge.free()
        run.check_fit(policy, [*prompts, *run.heldout_prompts])  # not only after training
        stage.begin()
        missing = [n for n in range(0, len(prompts), config.shard_size) if not stage.part(n // config.shard_size).exists()]
        total = sum(len(prompts[n : n + config.shard_size]) for n in missing) * config.sample.n
        with run.metered(policy, f"{base} sample", total, "responses", stage) as engine:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                groups = sample(engine, shard, run.constitution, config.sample, seed=config.seed, purpose=f"{iteration}-candidate")
                return [group_to_json(g.replace(prompt_ids=tuple(engine.encode_chat(g.prompt.messages)))) for g in groups]

            return run_in_parts(stage, prompts, config.shard_size, work, crew=engine)

    return Step("sample", stage, do)


def evaluate_step(run: Context, base: str, judging: Judging, config: RunConfig, sampled: Stage, *, name: str = "2-evaluate") -> Step:
    """2-evaluate: every finished candidate scored on every objective."""
    stage = run.folder.stage(f"{base}/{name}", {"from": sampled.digest, **judging.inputs, "shard_size": config.shard_size}, over=sampled)

    def do() -> dict[str, Any]:
        judgements = judging.judgements()
        total = sum(r.finished for g in _left(stage, sampled) for r in g.candidates)
        with run.metered(judging.judge, f"{base} evaluate", total, "responses", stage) as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                scored = score_groups(judging.judge.scoring(stage), shard, judging.objectives, judgements)
                engine.tick(sum(r.finished for g in shard for r in g.candidates))
                return [group_to_json(g) for g in scored]

            return run_over_parts(stage, sampled, _group, work, crew=engine)

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
        **({} if config.denoise.enabled else {"denoise": False}),  # then nearly every prompt gets one
    }
    stage = run.folder.stage(f"{base}/3-refine", inputs, over=scored)

    def do() -> dict[str, Any]:
        judgements, objectives = judging.judgements(), judging.resolved()
        lost = partial(hopeless, objectives=objectives, denoised=config.denoise.enabled)
        kinds = 2 if config.refine.placebo else 1
        total = sum(not lost(g) for g in _left(stage, scored)) * config.refine.drafts * kinds * 2
        with run.metered(policy, f"{base} refine", total, "drafts, written and scored", stage) as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                worth = [g for g in shard if not lost(g)]
                drafts = draft(engine, worth, run.constitution, config.refine, config.sample, seed=config.seed)
                cases = [case for g, d in zip(worth, drafts, strict=True) for case in cases_of(g, (*d.refined, *d.placebo))]
                scored_by_id = {r.id: r for r in score_responses(judging.judge.scoring(stage), cases, objectives, judgements)}
                engine.tick(sum(len(d.refined) + len(d.placebo) for d in drafts))
                by_prompt = {g.prompt.id: d for g, d in zip(worth, drafts, strict=True)}
                return [_drafts_row(g.prompt.id, by_prompt.get(g.prompt.id, Drafts(())), scored_by_id) for g in shard]

            return run_over_parts(stage, scored, _group, work, crew=engine)

    return Step("refine", stage, do)


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
    return [scored, refined, denoised, pair_step(run, base, policy, judging, config, scored.stage, refined.stage, denoised.stage)]


def reference_steps(run: Context, base: str, sampled: Stage) -> list[Step]:
    """The same candidates scored by the reference judge: what the run's judge is compared with."""
    assert run.reference_judge is not None
    config = run.config.model_copy(update={"self_evaluation": run.config.self_evaluation.of_reference()})
    there = f"{base}/reference"
    judging, checked = judging_step(run, there, run.reference_judge, config, first=True, judge=run.reference_judge)
    return [*checked, evaluate_step(run, there, judging, config, sampled)]


def _left(stage: Stage, source: Stage) -> Iterator[PromptGroup]:
    """The groups of `source` that `stage` lacks, one part in memory at a time."""
    stage.begin()
    for n, part in enumerate(source.finished_parts()):
        if not stage.part(n).exists():
            yield from map(_group, part.lines())


def _group(line: bytes) -> PromptGroup:
    return group_from_json(decode_row(line))


def _drafts_row(prompt_id: str, drafts: Drafts, scored: Mapping[str, Response]) -> Row:
    sides = {"refined": drafts.refined, "placebo": drafts.placebo}
    return {"prompt_id": prompt_id, **{k: [response_to_json(scored.get(r.id, r)) for r in v] for k, v in sides.items()}}
