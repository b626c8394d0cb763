"""A judge against a reference judge on the same answers: agreement per objective, and how it falls where the judge's scores scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spalign.constitution import Objective
from spalign.preference import covariance_det, is_scored
from spalign.preference.order import score_of
from spalign.types import PromptGroup

SHARES = tuple(i / 20 for i in range(1, 21))
LEAST_FALL = 0.05
"""A fall of the RV coefficient smaller than this proposes no tau."""
_LEAST_PROMPTS = 10

Scores = NDArray[np.float64]


def agreement(
    own: Sequence[PromptGroup], reference: Sequence[PromptGroup], objectives: Sequence[Objective], *, ddof: int, scale: float
) -> dict[str, Any]:
    """How far the two judges agree on the candidates that both scored on every objective. The lists hold the same prompts in order.

    objectives: name -> pearson, and within: the share of pairs of answers to one prompt that both order alike, of those that neither calls
    equal. rv: [share of the prompts, RV coefficient of their answers' scores], prompts added in order of the judge's rising det(Sigma).
    proposed: where that curve breaks, as tau (in units of scale^(2k)) and as the share of prompts below it; None where it does not fall.
    """
    prompts = [(x, y) for a, b in zip(own, reference, strict=True) if len((xy := _both(a, b, objectives))[0]) >= 2 for x, y in (xy,)]
    if not prompts:
        return {"prompts": 0, "answers": 0, "objectives": {}, "rv": [], "proposed": None}
    x, y = (np.concatenate(side) for side in zip(*prompts, strict=True))
    dets = [covariance_det(a.tolist(), ddof=ddof, scale=scale) for a, _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (dets[i], i))
    curve = []
    for share in SHARES:
        taken = [prompts[i] for i in order[: math.ceil(share * len(order))]]
        curve.append((share, rv_coefficient(*(np.concatenate(side) for side in zip(*taken, strict=True)))))
    return {
        "prompts": len(prompts),
        "answers": len(x),
        "objectives": {
            o.name: {"pearson": _pearson(x[:, k], y[:, k]), "within": _within([(a[:, k], b[:, k]) for a, b in prompts])}
            for k, o in enumerate(objectives)
        },
        "rv": [[share, _known(value)] for share, value in curve],
        "proposed": _break(curve, [dets[i] for i in order]),
    }


def rv_coefficient(x: Scores, y: Scores) -> float:
    """RV coefficient of two score matrices (answers, objectives), 0..1: a squared correlation of whole matrices; NaN where one is constant.

    tr(Sxy Syx) / sqrt(tr(Sxx^2) tr(Syy^2)), columns centred.
    """
    a, b = x - x.mean(0), y - y.mean(0)
    below = math.sqrt(float(((a.T @ a) ** 2).sum() * ((b.T @ b) ** 2).sum()))
    return float(((a.T @ b) ** 2).sum()) / below if below > 0 else math.nan


def _break(curve: Sequence[tuple[float, float]], dets: Sequence[float]) -> dict[str, float] | None:
    """The split of the curve into two levels that leaves the least squared error, if the second is lower by LEAST_FALL."""
    points = [(s, v) for s, v in curve if s * len(dets) >= _LEAST_PROMPTS and math.isfinite(v)]
    best: tuple[float, float, float] | None = None
    for cut in range(1, len(points)):
        left, right = (np.array([v for _, v in part]) for part in (points[:cut], points[cut:]))
        error = float(((left - left.mean()) ** 2).sum() + ((right - right.mean()) ** 2).sum())
        if best is None or error < best[0]:
            best = (error, points[cut - 1][0], float(left.mean() - right.mean()))
    if best is None or best[2] < LEAST_FALL:
        return None
    tau = dets[math.ceil(best[1] * len(dets)) - 1]
    return {"tau": tau, "share": best[1], "fall": best[2]} if tau > 0 else None


def _both(a: PromptGroup, b: PromptGroup, objectives: Sequence[Objective]) -> tuple[Scores, Scores]:
    pairs = [(x, y) for x, y in zip(a.candidates, b.candidates, strict=True) if is_scored(x, objectives) and is_scored(y, objectives)]
    x, y = (np.array([[score_of(pair[side], o) for o in objectives] for pair in pairs], float) for side in (0, 1))
    return x, y


def _pearson(x: Scores, y: Scores) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else None


def _within(prompts: Sequence[tuple[Scores, Scores]]) -> float | None:
    same = total = 0
    for x, y in prompts:
        for i in range(len(x)):
            for j in range(i):
                lead = (x[i] - x[j]) * (y[i] - y[j])
                same, total = same + int(lead > 0), total + int(lead != 0)
    return same / total if total else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
