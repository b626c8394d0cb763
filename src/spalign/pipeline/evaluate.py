"""Before and after on held-out prompts, judged alike: by the frozen iteration-0 policy, or by the judge that is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spalign import prompts as prompt_sets
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.judging import Judging
from spalign.rollout import sample
from spalign.selfeval import Case, score_responses
from spalign.store import Row, Stage, run_in_parts
from spalign.types import Prompt, PromptGroup, group_from_json, group_to_json


def evaluation_steps(run: Context, when: str, policy: Policy, judging: Judging, rivals: Stage | None = None) -> list[Step]:
    """Two steps: answers of `policy` to the bare held-out prompts, then their scores. `when` is "before" or "after".

    rivals: the stage of answers that a comparing scorer holds these against; default: these answers themselves.
    """
    config = run.config
    settings = config.sample.model_copy(update={"n": config.evaluation.samples, "temperature": config.evaluation.temperature})
    inputs = {
        "policy": policy.digest,
        "prompts": prompt_sets.sha256(run.heldout_prompts),
        "sample": settings.model_dump(),
        "seed": config.seed,
        "engine": config.engine.matters(),
        "shard_size": config.shard_size,
    }
    answered = run.folder.stage(f"evaluation/{when}/1-sample", inputs, policy.made_by)
    against = rivals or answered
    asked = {"from": answered.digest, "rivals": against.digest, **judging.inputs, "shard_size": config.shard_size}
    judged = run.folder.stage(f"evaluation/{when}/2-judge", asked, rivals, over=answered)
    judge = judging.judge

    def answer() -> dict[str, Any]:
        if policy is not judge:
            judge.free()
        run.check_fit(policy, run.heldout_prompts)
        with run.metered(policy, f"evaluation {when}: sample", len(run.heldout_prompts) * settings.n, "responses", answered) as engine:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                return [
                    group_to_json(g) for g in sample(engine, shard, run.constitution.bare(), settings, seed=config.seed, purpose="heldout")
                ]

            return run_in_parts(answered, run.heldout_prompts, config.shard_size, work, crew=engine)

    def score() -> dict[str, Any]:
        if policy is not judge:
            policy.free()
        judgements = judging.judgements()
        rivals_of = {g.prompt.id: g.candidates for g in groups_of(against)}
        groups = groups_of(answered)
        with run.metered(judge, f"evaluation {when}: judge", sum(len(g.candidates) for g in groups), "responses", judged) as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                cases = [Case(g.prompt, r, rivals_of[g.prompt.id]) for g in shard for r in g.candidates]
                scored = {r.id: r for r in score_responses(judge.scoring(judged), cases, judging.objectives, judgements)}
                engine.tick(len(cases))
                return [group_to_json(g.replace(candidates=tuple(scored[r.id] for r in g.candidates))) for g in shard]

            return run_in_parts(judged, groups, config.shard_size, work, crew=engine)

    return [Step(f"evaluation-{when}-sample", answered, answer), Step(f"evaluation-{when}-judge", judged, score)]


def groups_of(stage: Stage) -> list[PromptGroup]:
    return [group_from_json(row) for row in stage.rows()]
