"""The judge of a judged evaluation, and what it is worth on labelled answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spalign.config import AssessConfig, JudgeConfig, RunConfig
from spalign.constitution import Constitution, Objective
from spalign.engines.make import identify, load_engine
from spalign.engines.models import fingerprint
from spalign.evaluation.inspect_tasks import Case, InspectModel, Read
from spalign.evaluation.judges import AskedJudge, Judge, OwnJudge, ToScore, asks
from spalign.evaluation.question_files import spread
from spalign.pipeline.context import Context, EngineFactory, Policy
from spalign.pipeline.judging import Judging, judging_step
from spalign.report import Progress
from spalign.selfeval import Case as SelfCase
from spalign.selfeval import Judgement, load_labelled, score_responses, shipped_objectives
from spalign.selfeval.statistics import auc, auc_interval
from spalign.store import RunFolder
from spalign.types import Response

Asked = Callable[[str, Sequence[Case], Mapping[str, Read]], dict[str, dict[str, Any]]]
"""(what for, cases, readings) -> case id -> reading -> {value, said}; kept on disk."""


def asked_judge(config: JudgeConfig) -> AskedJudge:
    """A model of Inspect's; nothing is loaded or asked yet."""
    _, _, path = config.model.partition("/")
    local = config.args.get("model_path") or path
    weights = fingerprint(str(local)) if Path(str(local)).is_dir() else None  # by its name alone it would stay the same when it is trained
    identity = [config.model, config.base_url, config.max_tokens, sorted(config.args.items()), weights, asks()]
    return AskedJudge(config.model, InspectModel(config), identity)


def own_judge(
    config: AssessConfig, constitution: Constitution, folder: RunFolder, ui: Progress, make: EngineFactory | None
) -> tuple[OwnJudge, list[dict[str, Any]]]:
    """A local model, read as its check finds best, and the check: a row an objective.

    The check is a stage of `folder`, and kept for other evaluations and runs. make: an engine of the caller's own.
    """
    assert config.judge is not None and config.judge.own is not None
    name = config.judge.own
    engine = config.judge.engine or config.engine
    evaluation = {"allow_weak_judge": True, "judge_file": config.judge.judge_file, "use_constitution_thresholds": False}
    parts = {"engine": engine.model_dump(), "self_evaluation": evaluation}
    run = RunConfig.model_validate({"name": config.name, "model": name, "constitution": config.constitution, **parts})
    load = make or (lambda n: load_engine(n, engine))
    policy = Policy(name, identify(name, engine), load, served=engine.served)
    context = Context(run, run.constitution_for_run(), folder, ui, [], [], load, load, shares_checks=make is None)
    judging, steps = judging_step(context, "judge", policy, run, first=True)
    for step in steps:
        if step.stage.manifest() is None:
            step.do()
    judgements = judging.judgements()
    read = {o: f"{how.scorer}, AUC {how.auc}" for o, how in judgements.items()}
    scores = _scores(policy, constitution.objectives, judgements)
    identity = [judging.inputs, engine.matters()]
    return OwnJudge(config.judge.model, read, identity, constitution.objectives[-1], scores), _own_check(judging)


def _scores(
    policy: Policy, objectives: Sequence[Objective], judgements: Mapping[str, Judgement]
) -> Callable[[Sequence[ToScore]], list[float | None]]:
    by_name = {o.name: o for o in objectives}

    def score_many(items: Sequence[ToScore]) -> list[float | None]:
        scores: list[float | None] = [None] * len(items)
        for name in dict.fromkeys(item.objective for item in items):
            mine = [i for i, item in enumerate(items) if item.objective == name]
            cases = [SelfCase(items[i].prompt, Response(str(i), items[i].answer, (), True)) for i in mine]
            found = score_responses(policy.engine, cases, [by_name[name]], judgements)
            for i, response in zip(mine, found, strict=True):
                scores[i] = response.scores.get(name)
        return scores

    return score_many


def _own_check(judging: Judging) -> list[dict[str, Any]]:
    found = {row["objective"]: row["judgement"] for row in judging.check.rows()} if judging.check else {}
    found |= {name: how.model_dump(mode="json") for name, how in judging.known.items()}
    return [{"objective": name, **{k: j[k] for k in ("scorer", "auc", "auc_ci", "on", "verdict")}} for name, j in found.items() if j]


def check_asked(judge: Judge, objectives: Sequence[Objective], count: int, ask: Asked) -> list[dict[str, Any]]:
    """As `own_judge`'s check, for a judge that is asked in words: on up to `count` of the shipped answers an objective."""
    shipped = [o for o in objectives if o.name in shipped_objectives()]
    if not count or not shipped:
        return []
    labelled = load_labelled(None, [o.name for o in shipped])
    out = []
    for objective in shipped:
        some = []
        for label in (0, 1):
            mine = [c for c in labelled if c.objective == objective.name and c.label == label]
            some += spread(mine, max(1, count // 2))
        cases = [Case(f"{objective.name}-{i}", c.case.prompt, c.case.response.text, facts={"label": c.label}) for i, c in enumerate(some)]
        found = ask(objective.name, cases, {objective.name: score_read(judge, objective)})
        read = [(found[k.id][objective.name]["value"], c) for k, c in zip(cases, some, strict=True)]
        known = [(v, c) for v, c in read if v is not None]
        values, labels, prompts = [v for v, _ in known], [c.label for _, c in known], [c.case.prompt.id for _, c in known]
        area = auc(values, labels) if known else math.nan
        told = {"auc": None, "auc_ci": None} if math.isnan(area) else {"auc": area, "auc_ci": list(auc_interval(values, labels, prompts))}
        facts = {"objective": objective.name, "scorer": "asked, 1-10", "on": f"{len(some)} shipped"}
        out.append({**facts, **told, "unparsed": len(some) - len(known)})
    return out


def score_read(judge: Judge, objective: Objective) -> Read:
    async def read(case: Case) -> Any:
        return await judge.score(case.prompt, case.answer, objective)

    return read
