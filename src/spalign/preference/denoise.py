"""Dual-criterion denoising (SPA, "Dual-Criterion Denoising"): which groups are worth learning from, and why the others are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Literal

from spalign.config import DenoiseConfig
from spalign.constitution import Objective
from spalign.preference.order import SLACK, is_scored, level, met, score_of
from spalign.types import SCORE_MAX, DropReason, PromptGroup, Response

Consistency = Literal["strict", "above_mean"]
_BAR = {"strict": "max", "above_mean": "mean"}
Problem = tuple[DropReason, str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What denoising says of one group.

    reason: why it is dropped (None: kept); detail: the same in words and numbers.
    det: det(Sigma) of its candidates, in units of scale^(2k); None where the group left before it could be taken.
    consistent: whether the refined response passes the consistency rule; None where the group left before that could be tested.
    """

    group: PromptGroup
    reason: DropReason | None
    det: float | None
    detail: str
    consistent: bool | None = None

    @property
    def kept(self) -> bool:
        return self.reason is None


def denoise(groups: Sequence[PromptGroup], objectives: Sequence[Objective], config: DenoiseConfig) -> list[Verdict]:
    """One verdict a group, in order: consistent, and 0 < det(Sigma) <= tau."""
    verdicts = [check(group, objectives, config, None) for group in groups]
    tau = resolve_tau([v.det for v in verdicts if v.kept and v.det is not None], config)
    return [_bounded(v, tau) for v in verdicts]


def check(group: PromptGroup, objectives: Sequence[Objective], config: DenoiseConfig, tau: float | None) -> Verdict:
    """The verdict on one group under a known tau (None: no upper bound). The first thing that fails gives the reason."""
    if not config.enabled:
        problem = _too_few_to_pair(group, objectives)
        return Verdict(group, problem[0] if problem else None, None, problem[1] if problem else "")
    if group.refined is None and (lost := hopeless(group, objectives)):
        if lost[0] is DropReason.UNINFORMATIVE:  # top marks for all say more than that they are equal
            candidates = usable_candidates(group, objectives)
            lost = _ceiling([(o, _levels(candidates, o)) for o in objectives], config.consistency) or lost
        return Verdict(group, lost[0], None, lost[1])
    candidates = usable_candidates(group, objectives)
    if problem := _incomplete(group) or _unscored(group, candidates, objectives):
        return Verdict(group, problem[0], None, problem[1])
    assert group.refined is not None  # or it would be incomplete
    det = covariance_det([[score_of(c, o) for o in objectives] for c in candidates], ddof=config.ddof, scale=config.scale)
    problem = _inconsistent(group.refined, candidates, objectives, config.consistency)
    consistent = problem is None
    if consistent and det == 0:
        problem = _uninformative(candidates, objectives)
    reason, detail = problem or (None, "")
    return _bounded(Verdict(group, reason, det, detail, consistent), tau)


def hopeless(group: PromptGroup, objectives: Sequence[Objective], *, denoised: bool = True) -> Problem | None:
    """Why no refined response, however good, could keep this group, whatever tau and the rule; None if one could.

    Refinement is spared such a group: too few usable candidates, or det(Sigma) = 0. denoised: whether groups are denoised at all.
    """
    candidates = usable_candidates(group, objectives)
    if problem := _too_few(group) or _too_few_scored(group, candidates):
        return problem
    if not denoised:
        return None
    det = covariance_det([[score_of(c, o) for o in objectives] for c in candidates], ddof=0, scale=SCORE_MAX)
    return _uninformative(candidates, objectives) if det == 0 else None


def _too_few_to_pair(group: PromptGroup, objectives: Sequence[Objective]) -> Problem | None:
    """Without denoising: fewer than two usable responses, the refined one among them."""
    n = len(usable((*group.candidates, group.refined), objectives))
    if n >= 2:
        return None
    candidates = usable_candidates(group, objectives)
    return _too_few(group) or _too_few_scored(group, candidates) or (DropReason.UNSCORED, f"{n} usable responses; two are needed")


def usable(responses: Iterable[Response | None], objectives: Sequence[Objective]) -> tuple[Response, ...]:
    """Those that may be compared and trained on: there, finished, not blank, scored on every objective."""
    return tuple(r for r in responses if r is not None and is_usable(r, objectives))


def is_usable(response: Response, objectives: Sequence[Objective]) -> bool:
    return _complete(response) and is_scored(response, objectives)


def usable_candidates(group: PromptGroup, objectives: Sequence[Objective]) -> tuple[Response, ...]:
    """The candidates that denoising and pairing look at."""
    return usable(group.candidates, objectives)


def dominates(refined: Response, candidates: Sequence[Response], objectives: Sequence[Objective], consistency: Consistency) -> bool:
    """The consistency rule: on every objective the refined response is above the candidates' max (strict) or mean (above_mean).

    Levels are compared; a threshold that the refined response meets asks for nothing more. Without thresholds and
    resolutions, `strict` is the paper's rule: s~ > max_i s^(i) on every axis. At least one candidate is needed.
    """
    return all(_reaches(score_of(refined, o), _levels(candidates, o), o, consistency) for o in objectives)


def consistent_yield(
    groups: Iterable[PromptGroup],
    objectives: Sequence[Objective],
    config: DenoiseConfig,
    *,
    of: Literal["refined", "placebo"] = "refined",
) -> tuple[int, int]:
    """(passed, tested): groups whose refined response, or placebo put in its place, passes the consistency rule.

    Tested are those in which it is usable and has at least two usable candidates to be compared with.
    """
    verdicts = [passes(getattr(g, of), usable_candidates(g, objectives), objectives, config.consistency) for g in groups]
    return sum(v is True for v in verdicts), sum(v is not None for v in verdicts)


def passes(
    response: Response | None, candidates: Sequence[Response], objectives: Sequence[Objective], consistency: Consistency
) -> bool | None:
    """Whether a refined response or placebo passes the consistency rule; None where that cannot be tested. candidates: the usable ones."""
    if response is None or len(candidates) < 2 or not is_usable(response, objectives):
        return None
    return dominates(response, candidates, objectives, consistency)


def covariance_det(rows: Sequence[Sequence[float]], *, ddof: int, scale: float) -> float:
    """det(Sigma), the k x k covariance of SPA, Eq. 1, in units of scale^(2k).

    rows: (n, k), a row a candidate, raw scores on 0..10; they are expressed on 0..scale. Fewer than ddof + 1 rows give 0.
    Floats are binary fractions, so all is done in integers and rounded once: the order of rows cannot matter, and collinear
    integer scores give exactly 0. Scores that are not integers carry rounding error of their own: there det <= 1e-12 times
    the product of the variances (1 - r^2 <= 1e-12 for k = 2) counts as exactly 0.
    """
    n, k = len(rows), len(rows[0]) if rows else 0
    if n < ddof + 1:
        return 0.0
    ratios = [x.as_integer_ratio() for row in rows for x in row]
    unit = max([den for _, den in ratios])  # denominators are powers of two: the greatest is common to all
    scaled = [num * (unit // den) for num, den in ratios]
    columns = [scaled[i::k] for i in range(k)]
    sums = [sum(column) for column in columns]
    # n S - s s^T = n (n - ddof) unit^2 Sigma, which is symmetric
    scatter = [[0] * k for _ in range(k)]
    for i in range(k):
        for j in range(i + 1):
            scatter[i][j] = scatter[j][i] = n * sum(map(mul, columns[i], columns[j])) - sums[i] * sums[j]
    variances = math.prod(scatter[i][i] for i in range(k))
    det = _gram_det(scatter)
    if unit > 1 and det * 10**12 <= variances:
        return 0.0
    denominator: int = (n * (n - ddof) * unit**2) ** k
    return det / denominator * (scale / SCORE_MAX) ** (2 * k)


def _gram_det(matrix: list[list[int]]) -> int:
    """Exact determinant of a positive semi-definite integer matrix (Bareiss); a zero pivot there means that it is singular."""
    m, last = matrix, 1
    while len(m) > 1:
        (pivot, *top), below = m[0], m[1:]
        if pivot == 0:
            return 0
        m = [[(x * pivot - row[0] * y) // last for x, y in zip(row[1:], top, strict=True)] for row in below]
        last = pivot
    return m[0][0]


def resolve_tau(dets: Sequence[float], config: DenoiseConfig) -> float | None:
    """tau: the configured one, or a quantile (linear interpolation) of the consistent groups' positive det(Sigma); None: no bound."""
    ordered = sorted(d for d in dets if d > 0)
    if not isinstance(config.tau, str):
        return config.tau
    quantile = config.tau_quantile or 0.0
    if not ordered:
        return None
    position = round(quantile * (len(ordered) - 1), 9)  # 0.29 * 100 is 28.999999999999996
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _complete(response: Response) -> bool:
    return response.finished and bool(response.text.strip())


def _levels(candidates: Sequence[Response], objective: Objective) -> list[float]:
    return [level(score_of(c, objective), objective) for c in candidates]


def _reaches(score: float, theirs: Sequence[float], objective: Objective, consistency: Consistency) -> bool:
    """The consistency rule for a refined response with this score, on one objective. theirs: the candidates' levels."""
    if met(score, objective):
        return True
    mine = level(score, objective)
    if consistency == "strict":
        return mine > max(theirs)
    return math.fsum([mine - x for x in theirs]) > SLACK * len(theirs)


def _incomplete(group: PromptGroup) -> Problem | None:
    if group.refined is None or not group.refined.text.strip():
        return DropReason.EMPTY, "no refined response" if group.refined is None else "the refined response is blank"
    if not group.refined.finished:
        return DropReason.TRUNCATED, "the refined response was cut off"
    return _too_few(group)


def _too_few(group: PromptGroup) -> Problem | None:
    if (complete := sum(map(_complete, group.candidates))) < 2:
        cut = any(not c.finished for c in group.candidates)
        detail = f"{complete} of {len(group.candidates)} candidates are finished and not blank; two are needed"
        return DropReason.TRUNCATED if cut else DropReason.EMPTY, detail
    return None


def _unscored(group: PromptGroup, candidates: Sequence[Response], objectives: Sequence[Objective]) -> Problem | None:
    if not usable([group.refined], objectives):
        return DropReason.UNSCORED, "the refined response lacks a score"
    return _too_few_scored(group, candidates)


def _too_few_scored(group: PromptGroup, candidates: Sequence[Response]) -> Problem | None:
    """candidates: the usable ones."""
    if len(candidates) < 2:
        return DropReason.UNSCORED, f"{len(candidates)} of {len(group.candidates)} candidates are usable and scored; two are needed"
    return None


def _uninformative(candidates: Sequence[Response], objectives: Sequence[Objective]) -> Problem:
    return DropReason.UNINFORMATIVE, f"det(Sigma) = 0 over {len(candidates)} candidates and {len(objectives)} objective(s)"


def _inconsistent(
    refined: Response, candidates: Sequence[Response], objectives: Sequence[Objective], consistency: Consistency
) -> Problem | None:
    """CEILING where not even SCORE_MAX would have passed on some objective: the scale is at fault, not the refined response."""
    bars = [(o, _levels(candidates, o)) for o in objectives]
    failed = [(o, theirs) for o, theirs in bars if not _reaches(score_of(refined, o), theirs, o, consistency)]
    if not failed:
        return None
    names = ", ".join(o.name for o, _ in failed)
    return _ceiling(failed, consistency) or (
        DropReason.NOT_DOMINATING,
        f"{names}: not above the candidates' {_BAR[consistency]}",
    )


def _ceiling(bars: Sequence[tuple[Objective, Sequence[float]]], consistency: Consistency) -> Problem | None:
    """bars: objectives, each with the candidates' levels."""
    for o, theirs in bars:
        if not _reaches(SCORE_MAX, theirs, o, consistency):
            return DropReason.CEILING, f"{o.name}: the candidates' {_BAR[consistency]} is at the top of the scale"
    return None


def _bounded(verdict: Verdict, tau: float | None) -> Verdict:
    if verdict.kept and (problem := unstable(verdict.det, tau)):
        return replace(verdict, reason=problem[0], detail=problem[1])
    return verdict


def unstable(det: float | None, tau: float | None) -> Problem | None:
    """Why a consistent group's det(Sigma) is too great under tau; None where it is not."""
    if det is not None and tau is not None and det > tau:
        return DropReason.UNSTABLE, f"det(Sigma) = {det:g} > tau = {tau:g}"
    return None
