"""Scores for every response of every group, on every objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from spalign.config import SelfEvaluationConfig
from spalign.constitution import Objective
from spalign.engines.base import Capability, Engine, require
from spalign.selfeval.likert import LikertScorer
from spalign.selfeval.yes_no import YesNoScorer
from spalign.types import Prompt, PromptGroup, Response


class Scorer(Protocol):
    """A way to ask. `needs` is what the engine must be able to do for it."""

    name: str
    needs: Capability

    def score(self, engine: Engine, items: Sequence[tuple[Prompt, Response]], objective: Objective) -> list[float | None]: ...


SCORERS: dict[str, Scorer] = {s.name: s for s in (YesNoScorer(), LikertScorer())}


def check_scorers(engine: Engine, objectives: Sequence[Objective], config: SelfEvaluationConfig) -> None:
    """Refuse, before any work starts, a scorer that the engine cannot run (EngineError)."""
    for objective in objectives:
        scorer = SCORERS[config.scorer_of(objective.name)]
        require(engine, scorer.needs, f"the scorer '{scorer.name}' for '{objective.name}'")


def score_responses(
    engine: Engine, items: Sequence[tuple[Prompt, Response]], objectives: Sequence[Objective], config: SelfEvaluationConfig
) -> list[Response]:
    """The responses of `items`, in order, with fresh scores. A score that cannot be had is absent. Blank texts are not scored."""
    check_scorers(engine, objectives, config)
    asked = [(i, item) for i, item in enumerate(items) if item[1].text.strip()]
    scores: list[dict[str, float]] = [{} for _ in items]
    for objective in objectives:
        values = SCORERS[config.scorer_of(objective.name)].score(engine, [item for _, item in asked], objective)
        for (i, _), value in zip(asked, values, strict=True):
            if value is not None:
                scores[i][objective.name] = value
    return [dataclasses.replace(response, scores=s) for (_, response), s in zip(items, scores, strict=True)]


def score_groups(
    engine: Engine, groups: Sequence[PromptGroup], objectives: Sequence[Objective], config: SelfEvaluationConfig
) -> list[PromptGroup]:
    """The groups with every finished candidate scored (stage 2). Unfinished ones never enter a pair and are left alone."""
    items = [(g.prompt, r) for g in groups for r in g.candidates if r.finished]
    scored = {r.id: r for r in score_responses(engine, items, objectives, config)}
    return [g.replace(candidates=tuple(scored.get(r.id, r) for r in g.candidates)) for g in groups]
