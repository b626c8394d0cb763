"""The priority gate: whether a trained model's primary objective is shown to hold, by a one-sided test of non-inferiority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from spalign.evaluation.metrics import resampled_means

Verdict = Literal["held", "lost", "not shown"]

LEAST_PROMPTS = 2
"""Of one prompt a bootstrap knows no spread, and would call any value certain."""
LEAST_SHARE = 0.5
"""Where fewer of the prompts are scored on both sides, those that are may be the ones that suit the model."""
_MANY = 100_000


@dataclass(frozen=True, slots=True)
class GateResult:
    """held: lower > -margin. lost: the mean itself fell by margin or more. not shown: the interval is too wide, or too few are scored.

    difference: mean over prompts of after - before, in score points; lower: its one-sided lower bound at `confidence`; None without
    prompts. prompts: scored on both sides; unscored: the others, left out.
    """

    verdict: Verdict
    difference: float | None
    lower: float | None
    margin: float
    confidence: float
    prompts: int
    unscored: int

    @property
    def passed(self) -> bool:
        return self.verdict == "held"

    def text(self, objective: str) -> str:
        """The figures in one line."""
        left_out = f" ({self.unscored} more not scored on both sides)" if self.unscored else ""
        if self.difference is None or self.lower is None:
            return f"{objective} not scored before and after on any prompt{left_out}"
        bound = f"one-sided {100 * self.confidence:.4g}% lower bound {self.lower:+.2f}"
        return f"{objective} {self.difference:+.2f}, {bound} on {self.prompts} prompts{left_out}; must stay above -{self.margin:g}"

    def wanted_prompts(self) -> int | None:
        """About how many prompts would show it, if the difference stayed as it is: a bound narrows with their root; None: not sensible."""
        if self.verdict != "not shown" or self.difference is None or self.lower is None or self.prompts < LEAST_PROMPTS:
            return None
        width, room = self.difference - self.lower, self.difference + self.margin
        wanted = self.prompts * (width / room) ** 2
        return math.floor(wanted) + 1 if self.prompts <= wanted < _MANY else None

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def priority_gate(
    before: Sequence[float | None], after: Sequence[float | None], *, margin: float, confidence: float, resamples: int, seed: int
) -> GateResult:
    """before, after: the primary's mean of each held-out prompt, in the same order; None where no answer was scored.

    Non-inferior where the `1 - confidence` quantile of the means of resampled prompts' differences lies above -margin. The order of
    prompts does not matter.
    """
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not None and y is not None]
    differences = sorted(y - x for x, y in pairs if math.isfinite(x) and math.isfinite(y))
    n = len(differences)
    difference = lower = None
    verdict: Verdict = "not shown"
    if n:
        difference = float(np.mean(differences))
        lower = float(np.quantile(resampled_means(differences, resamples=resamples, seed=seed), 1 - confidence))
        if difference <= -margin:
            verdict = "lost"
        elif lower > -margin and n >= LEAST_PROMPTS and n >= LEAST_SHARE * len(before):
            verdict = "held"
    return GateResult(verdict, difference, lower, margin, confidence, n, len(before) - n)
