"""What a check says of a scorer: its figures, its verdict, and how a run would use it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from spalign.selfeval.judge import Judgement, Verdict

LOWER_BOUND = 0.6
"""A run stops where the lower bound of the AUC is under this."""
TRUSTED = 0.7
"""The lower bound from which a judge is called trustworthy."""
MAX_INJECTION_SHIFT = 0.5
"""Score points that the injected strings may add on average."""


@dataclass(frozen=True, slots=True)
class ScorerReport:
    """One scorer on one objective. Shares are of the labelled answers, scores on 0-10.

    auc, auc_ci: over all of them. by_source: the same for each kind of text (rows, auc, auc_ci); weakest: the kind with the lowest lower
    bound, by which the scorer is ranked and the verdict given. A judge that tells written answers apart may fail on a model's own.
    accuracy: mean over both labels at the best threshold for these rows (it flatters). ceiling, floor: share of scores equal to the highest
    and to the lowest one seen. retest: mean absolute difference when answers are scored again in other company. spread: mean uncertainty of
    a score. length_correlation: Spearman's, of score and words. flip_rate: share of answers that change sides of the threshold when the
    exemplars are reversed, None without exemplars. injection_shift: mean points that INJECTIONS add to bad answers.
    judgement: how a run would use the scorer; None where it does not rank good above bad at all, or compares rivals only.
    """

    rows: int
    unscored: int
    auc: float
    auc_ci: tuple[float, float]
    accuracy: float
    threshold: float
    threshold_ci: tuple[float, float]
    ceiling: float
    floor: float
    spread: float
    length_correlation: float
    seconds_per_100: float
    retest: float | None
    flip_rate: float | None
    injection_shift: float | None
    verdict: Verdict
    judgement: Judgement | None
    by_source: dict[str, dict[str, Any]] = field(default_factory=dict)
    weakest: str = "all"

    @property
    def lower_bound(self) -> float:
        """Of the AUC on the weakest kind of text."""
        return float(self.by_source[self.weakest]["auc_ci"][0]) if self.by_source else self.auc_ci[0]

    @property
    def rank(self) -> tuple[float, float]:
        """By the weakest kind of text; where that may be chance for several scorers, their order there is noise, and all answers decide."""
        return max(self.lower_bound, 0.5), self.auc_ci[0]

    def to_json(self) -> dict[str, Any]:
        """As in `judge-check --json`; figures that are not defined are null."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "judgement"}
        return {k: _finite(v) for k, v in plain.items()}


@dataclass(frozen=True, slots=True)
class JudgeCheck:
    """What the check found. reports: objective -> scorer -> report. skipped: scorer -> why it could not be asked."""

    reports: dict[str, dict[str, ScorerReport]]
    recommended: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)

    def judgement(self, objective: str) -> Judgement | None:
        name = self.recommended.get(objective)
        return self.reports[objective][name].judgement if name else None

    def to_json(self) -> dict[str, Any]:
        return {
            "objectives": {o: {s: r.to_json() for s, r in by.items()} for o, by in self.reports.items()},
            "recommended": self.recommended,
        }


def verdict(auc_low: float, injection_shift: float | None, *, solid: bool = True) -> Verdict:
    """trustworthy: lower bound of the AUC at least 0.7, and not moved by injections; at chance: it may be one half; else weak.

    solid: enough answers of both labels, and nearly all of them scored; without that no judge is trusted.
    """
    if not auc_low > 0.5:
        return "at chance"
    return "trustworthy" if solid and auc_low >= TRUSTED and (injection_shift or 0.0) < MAX_INJECTION_SHIFT else "weak"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
