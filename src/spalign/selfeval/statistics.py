"""How well scores tell good answers from bad ones: pure functions of scores, labels and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_RESAMPLES = 1000


def _preferred(good: Array, bad: Array) -> Array:
    """(good, bad): 1 where the good answer scores higher, 0.5 for a tie."""
    lead = good[:, None] - bad[None, :]
    return np.asarray((lead > 0) + 0.5 * (lead == 0), dtype=float)


def auc(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Share of (good, bad) pairs in which the good answer scores higher, ties counting half; NaN where one side is empty.

    scores, labels: (rows,); label 1 is good, 0 is bad.
    """
    s, y = np.asarray(scores, float), np.asarray(labels)
    return float(_preferred(s[y == 1], s[y == 0]).mean()) if 0 < y.sum() < len(y) else math.nan


def _multiplicities(clusters: Sequence[str], seed: int) -> NDArray[np.int64]:
    """(resamples, rows): how often each row is drawn when whole clusters are drawn with replacement."""
    names = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=_RESAMPLES)
    return np.asarray(drawn[:, [names[c] for c in clusters]])


def auc_interval(scores: Sequence[float], labels: Sequence[int], clusters: Sequence[str], *, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of `auc`; answers to one prompt (`clusters`) are drawn together. (NaN, NaN) where it is not defined."""
    s, y = np.asarray(scores, float), np.asarray(labels)
    if not 0 < y.sum() < len(y):
        return math.nan, math.nan
    times = _multiplicities(clusters, seed).astype(float)
    good, bad = times[:, y == 1], times[:, y == 0]
    total = good.sum(1) * bad.sum(1)
    values = np.einsum("rg,gb,rb->r", good, _preferred(s[y == 1], s[y == 0]), bad, optimize=True)[total > 0] / total[total > 0]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def equal_error_threshold(scores: Sequence[float], labels: Sequence[int]) -> float:
    """The threshold at which as large a share of the good answers is below it as of the bad ones is at or above it.

    It lies midway between two neighbouring scores; of several, the lowest.
    """
    return _threshold(scores, labels, lambda missed, passed: abs(missed - passed))


def recall_threshold(scores: Sequence[float], labels: Sequence[int], *, recall: float) -> float:
    """The lowest threshold that leaves at least the share `recall` of the bad answers below it."""
    return _threshold(scores, labels, lambda missed, passed: (passed > 1 - recall + 1e-12, missed))


def best_accuracy(scores: Sequence[float], labels: Sequence[int]) -> float:
    """Accuracy, the mean over both labels, at the threshold that is best for it on these very rows (so it flatters)."""
    best = _threshold(scores, labels, lambda missed, passed: missed + passed)
    return 1 - sum(errors_at(best, scores, labels)) / 2


def errors_at(threshold: float, scores: Sequence[float], labels: Sequence[int]) -> tuple[float, float]:
    """(share of the good below `threshold`, share of the bad at or above it)."""
    s, y = np.asarray(scores, float), np.asarray(labels)
    return float((s[y == 1] < threshold).mean()), float((s[y == 0] >= threshold).mean())


def _threshold(scores: Sequence[float], labels: Sequence[int], cost: Callable[[float, float], Any]) -> float:
    """The cut with the least `cost(share of good below, share of bad at or above)`; the lowest of equals."""
    values = sorted(set(map(float, scores)))
    cuts = [values[0], *((a + b) / 2 for a, b in pairwise(values)), values[-1] + 1e-3]
    return min(cuts, key=lambda c: (cost(*errors_at(c, scores, labels)), c))


def threshold_interval(
    find: Callable[[Sequence[float], Sequence[int]], float],
    scores: Sequence[float],
    labels: Sequence[int],
    clusters: Sequence[str],
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """95% bootstrap interval of the threshold that `find` gives, over prompts."""
    s, y = np.asarray(scores, float), np.asarray(labels)
    found = []
    for times in _multiplicities(clusters, seed)[:200]:
        rows = np.repeat(np.arange(len(s)), times)
        if 0 < y[rows].sum() < len(rows):
            found.append(find(s[rows].tolist(), y[rows].tolist()))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def fit_logistic(raw: Sequence[float], labels: Sequence[int]) -> tuple[float, float]:
    """(slope, centre) of P(good | raw) = sigmoid(slope * (raw - centre)), by Newton's method with Platt's smoothed targets.

    Platt's targets, (good + 1)/(good + 2) and 1/(bad + 2), keep the fit finite where the labels are separable. The slope is not positive
    where higher raw values do not go with better labels.
    """
    x, y = np.asarray(raw, float), np.asarray(labels)
    mean, spread = x.mean(), x.std()
    if spread == 0:
        return 0.0, float(mean)
    z = (x - mean) / spread
    good, bad = int((y == 1).sum()), int((y == 0).sum())
    target = np.where(y == 1, (good + 1) / (good + 2), 1 / (bad + 2))
    features, theta = np.stack([z, np.ones_like(z)]), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(np.clip(-theta @ features, -500, 500)))
        step = np.linalg.solve((features * (p * (1 - p))) @ features.T + 1e-9 * np.eye(2), features @ (p - target))
        theta -= step
        if np.abs(step).max() < 1e-10:
            break
    slope = theta[0] / spread
    return float(slope), float(mean - theta[1] / slope) if slope else float(mean)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation with mean ranks for ties; NaN where one side is constant."""
    x, y = _ranks(a), _ranks(b)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: Sequence[float]) -> Array:
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], float)
