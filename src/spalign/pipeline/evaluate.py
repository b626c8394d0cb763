"""Before and after on held-out prompts, judged by the frozen iteration-0 policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spalign import prompts as prompt_sets
from spalign.pipeline.context import Context, Policy, Step
from spalign.rollout import sample
from spalign.selfeval import score_responses
from spalign.store import Row, Stage, run_in_parts
from spalign.types import Prompt, PromptGroup, group_from_json, group_to_json


def evaluation_steps(run: Context, when: str, policy: Policy, judge: Policy) -> list[Step]:
    """Two steps: answers of `policy` to the bare held-out prompts, then their scores by `judge`. `when` is "before" or "after"."""
    config = run.config
    settings = config.sample.model_copy(update={"n": config.evaluation.samples, "temperature": config.evaluation.temperature})
    inputs = {
        "policy": policy.digest,
        "prompts": prompt_sets.sha256(run.heldout_prompts),
        "sample": settings.model_dump(),
        "seed": config.seed,
        "engine": config.engine.model_dump(exclude={"batch_size"}),
        "shard_size": config.shard_size,
    }
    answered = run.folder.stage(f"evaluation/{when}/1-sample", inputs)
    judged = run.folder.stage(
        f"evaluation/{when}/2-judge",
        {
            "from": answered.digest,
            "judge": judge.digest,
            "objectives": [o.model_dump(exclude={"threshold", "resolution"}) for o in run.objectives],
            "scorers": {o.name: config.self_evaluation.scorer_of(o.name) for o in run.objectives},
        },
    )

    def answer() -> dict[str, Any]:
        if policy is not judge:
            judge.free()
        run.check_fit(policy, run.heldout_prompts)
        with run.metered(policy, f"evaluation {when}: sample", len(run.heldout_prompts) * settings.n, "responses") as engine:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                return [
                    group_to_json(g) for g in sample(engine, shard, run.constitution.bare(), settings, seed=config.seed, purpose="heldout")
                ]

            return run_in_parts(answered, run.heldout_prompts, config.shard_size, work, tokens=lambda: engine.tokens)

    def score() -> dict[str, Any]:
        if policy is not judge:
            policy.free()
        groups = groups_of(answered)
        total = len(run.objectives) * sum(bool(r.text.strip()) for g in groups for r in g.candidates)
        with run.metered(judge, f"evaluation {when}: judge", total, "scores") as engine:

            def work(shard: Sequence[PromptGroup]) -> list[Row]:
                items = [(g.prompt, r) for g in shard for r in g.candidates]
                scored = {r.id: r for r in score_responses(engine, items, run.objectives, config.self_evaluation)}
                return [group_to_json(g.replace(candidates=tuple(scored[r.id] for r in g.candidates))) for g in shard]

            return run_in_parts(judged, groups, config.shard_size, work, tokens=lambda: engine.tokens)

    return [Step(f"evaluation-{when}-sample", answered, answer), Step(f"evaluation-{when}-judge", judged, score)]


def groups_of(stage: Stage) -> list[PromptGroup]:
    return [group_from_json(row) for row in stage.rows()]
