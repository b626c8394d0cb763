"""The priority order: what of a score counts, and which response is lexicographically greater.

A threshold ("met is met") and a resolution (bins) make scores tie, so that a lower objective may decide. Both keep the order
transitive; a tolerance on differences would not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from spalign.constitution import Objective
from spalign.errors import DataError
from spalign.types import Response

SLACK = 1e-9
"""Differences below this, in score points (0..10) or in bins, are float noise."""


def threshold(objective: Objective) -> float:
    """The score from which the objective is met, infinity for none. Raises DataError for `auto`, which a judge's check puts a number to."""
    if objective.threshold == "auto":
        raise DataError(
            f"objective '{objective.name}': the threshold is still 'auto'",
            hint="measure it with `spalign judge-check` (in Python: judge_check) and put its number in",
        )
    return math.inf if objective.threshold is None else objective.threshold


def met(score: float, objective: Objective) -> bool:
    """Whether the objective has a threshold and the score reaches it."""
    return score >= threshold(objective)


def level(score: float, objective: Objective) -> float:
    """What the order sees of a score, in score points: capped at the threshold; below it, the floor of its bin."""
    top, width = threshold(objective), objective.resolution
    if score >= top:
        return top
    return score if width is None else min(math.floor(score / width + SLACK) * width, top)


def levels(response: Response, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The response's levels, highest priority first; comparing these tuples is the priority order.

    Raises DataError where a score is missing: that is never a tie and never a default.
    """
    return tuple(level(score_of(response, o), o) for o in objectives)


def score_of(response: Response, objective: Objective) -> float:
    """The raw score, 0..10; raises DataError where there is none."""
    score = response.scores.get(objective.name)
    if score is None or not math.isfinite(score):
        raise DataError(
            f"response '{response.id}' has no score for objective '{objective.name}'",
            hint="score every response on every objective, or leave the unscored ones out with is_scored()",
        )
    return score


def is_scored(response: Response, objectives: Sequence[Objective]) -> bool:
    """Whether every objective has a (finite) score."""
    for o in objectives:
        score = response.scores.get(o.name)
        if score is None or not math.isfinite(score):
            return False
    return True


def best(responses: Iterable[Response], objectives: Sequence[Objective]) -> Response:
    """The greatest response (at least one is needed); ties go to the greater sum of raw scores, then to the first id."""

    def rank(response: Response) -> tuple[tuple[float, ...], float, str]:
        total = math.fsum(score_of(response, o) for o in objectives)
        return tuple(-x for x in levels(response, objectives)), -total, response.id

    return min(responses, key=rank)
