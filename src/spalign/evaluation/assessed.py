"""What judged answers of several models say: means and paired differences with intervals, by the prompts' intent, and at equal length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spalign.evaluation.compare import Measure, mean_of, measures_of, slices_of
from spalign.evaluation.metrics import Interval, at_equal_length, bootstrap_mean
from spalign.types import PromptGroup


def assessed(
    models: Mapping[str, Sequence[PromptGroup]], objectives: Sequence[str], lambdas: Sequence[float], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Label -> measure -> slice -> {mean, prompts, difference, equal_length}; all intervals are over prompts, 95%.

    models: label -> the same prompts in the same order, each with its judged answers; the first label is what others are compared with.
    difference: to the first, paired, over prompts that both have; equal_length: likewise for scores, at equal length; None: there is none.
    """
    first = next(iter(models.values()))
    slices = slices_of(first)
    out: dict[str, Any] = {}
    for label, groups in models.items():
        out[label] = {}
        for name, value in measures_of(objectives, lambdas).items():
            out[label][name] = {}
            for slice_, belongs in slices.items():
                pairs = [(b, g) for b, g in zip(first, groups, strict=True) if belongs(b.prompt.intent)]
                if told := _told(pairs, value, lengthwise=name in objectives, same=groups is first, resamples=resamples, seed=seed):
                    out[label][name][slice_] = told
    return out


def _told(
    pairs: Sequence[tuple[PromptGroup, PromptGroup]], value: Measure, *, lengthwise: bool, same: bool, resamples: int, seed: int
) -> dict[str, Any] | None:
    found = [(mean_of(b, value), mean_of(g, value), b, g) for b, g in pairs]
    mine = [y for _, y, _, _ in found if y is not None]
    if not mine:
        return None
    both = [(x, y, b, g) for x, y, b, g in found if x is not None and y is not None]
    told: dict[str, Any] = {"mean": _json(bootstrap_mean(mine, resamples=resamples, seed=seed)), "prompts": len(mine)}
    if same or not both:
        return {**told, "difference": None, "equal_length": None}
    differences = [y - x for x, y, _, _ in both]
    ratios = [math.log(max(_words(g), 1.0) / max(_words(b), 1.0)) for _, _, b, g in both]
    level = at_equal_length(differences, ratios, resamples=min(resamples, 1000), seed=seed) if lengthwise else None
    return {
        **told,
        "difference": _json(bootstrap_mean(differences, resamples=resamples, seed=seed)),
        "equal_length": _json(level) if level else None,
    }


def win_tie_lose(values: Sequence[tuple[str, Sequence[float | None]]], *, resamples: int, seed: int) -> dict[str, Any]:
    """slice -> shares of won, tied and lost, each with its interval over prompts, and how many comparisons were unparsed.

    values: of each prompt its intent and its comparisons, one a seed: 1 won, 0.5 tie, 0 lost, None unparsed.
    """
    out: dict[str, Any] = {}
    intents = sorted({i for i, _ in values if i})
    for slice_ in ("all", *intents):
        mine = [v for i, v in values if slice_ in ("all", i)]
        known = [k for vs in mine if (k := [v for v in vs if v is not None])]
        shares = {
            name: _json(bootstrap_mean([sum(v == wanted for v in vs) / len(vs) for vs in known], resamples=resamples, seed=seed))
            if known
            else None
            for name, wanted in (("win", 1.0), ("tie", 0.5), ("lose", 0.0))
        }
        out[slice_] = {**shares, "prompts": len(known), "unparsed": sum(v is None for vs in mine for v in vs)}
    return out


def _words(group: PromptGroup) -> float:
    return sum(r.words for r in group.candidates) / len(group.candidates)


def _json(interval: Interval) -> dict[str, Any]:
    return interval.to_json()
