"""Scores for every response of every group, on every objective: 0-10 and with an uncertainty."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from spalign.constitution import Objective
from spalign.engines.base import Engine
from spalign.errors import ConfigError
from spalign.selfeval.base import Case, Raw, Scorer
from spalign.selfeval.contrastive import ContrastiveScorer, PmiScorer
from spalign.selfeval.judge import Judgement, Member
from spalign.selfeval.likert import ExpectedScorer, LikertScorer
from spalign.selfeval.pairwise import PairwiseScorer
from spalign.selfeval.probe import PROBE, check_probe, representations
from spalign.selfeval.yes_no import YesNoScorer
from spalign.types import PromptGroup, Response

SCORERS: dict[str, Scorer] = {
    s.name: s
    for s in (
        LikertScorer(),
        ExpectedScorer(),
        YesNoScorer(few_shot=False),
        YesNoScorer(few_shot=True),
        ContrastiveScorer(),
        PmiScorer(),
        PairwiseScorer(),
    )
}
ENSEMBLE = "ensemble"
"""The standardised mean of other scorers: no scorer of its own, it shares what they read."""


def check_scorers(engine: Engine, objectives: Sequence[Objective], judgements: Mapping[str, Judgement]) -> None:
    """Refuse, before any work starts, a scorer that the engine or an objective cannot serve (SpalignError)."""
    for scorer, asked in _asked(objectives, judgements).items():
        if scorer != PROBE:
            SCORERS[scorer].check(engine, asked)
            continue
        check_probe(engine)
        if unfitted := [o.name for o in asked if judgements[o.name].probe is None]:
            raise ConfigError(
                f"the probe for objective '{unfitted[0]}' is not fitted",
                hint="use a judge.yaml made by `spalign judge-check`",
            )


def score_responses(
    engine: Engine, cases: Sequence[Case], objectives: Sequence[Objective], judgements: Mapping[str, Judgement]
) -> list[Response]:
    """The cases' responses, in order, with fresh scores (0..10) and spreads. A score that cannot be had is absent. Blank texts have none.

    judgements: objective -> how it is judged.
    """
    check_scorers(engine, objectives, judgements)
    asked = [(i, case) for i, case in enumerate(cases) if case.response.text.strip()]
    read = {
        scorer: _read(engine, scorer, [c for _, c in asked], some, judgements) for scorer, some in _asked(objectives, judgements).items()
    }
    scores: list[dict[str, float]] = [{} for _ in cases]
    spreads: list[dict[str, float]] = [{} for _ in cases]
    for o in objectives:
        how = judgements[o.name]
        raws = ensemble(how.members, {m: read[m][o.name] for m in how.members}) if how.scorer == ENSEMBLE else read[how.scorer][o.name]
        for (i, _), raw in zip(asked, raws, strict=True):
            if raw is not None:
                scores[i][o.name], spreads[i][o.name] = how.calibration.score(raw), how.calibration.spread(raw)
    return [dataclasses.replace(c.response, scores=s, spreads=d) for c, s, d in zip(cases, scores, spreads, strict=True)]


def _read(
    engine: Engine, scorer: str, cases: Sequence[Case], objectives: Sequence[Objective], judgements: Mapping[str, Judgement]
) -> dict[str, list[Raw | None]]:
    """Objective -> what the scorer reads off each case; the cases are read once for all objectives where the scorer can."""
    if scorer == PROBE:
        found = representations(engine, cases)
        return {o.name: probe.read(found) for o in objectives if (probe := judgements[o.name].probe)}
    return dict(zip((o.name for o in objectives), SCORERS[scorer].score(engine, cases, objectives), strict=True))


def score_groups(
    engine: Engine, groups: Sequence[PromptGroup], objectives: Sequence[Objective], judgements: Mapping[str, Judgement]
) -> list[PromptGroup]:
    """The groups with every finished candidate scored (stage 2). Unfinished ones never enter a pair and are left alone."""
    cases = [case for g in groups for case in cases_of(g, g.candidates)]
    scored = {r.id: r for r in score_responses(engine, cases, objectives, judgements)}
    return [g.replace(candidates=tuple(scored.get(r.id, r) for r in g.candidates)) for g in groups]


def all_scorers() -> tuple[str, ...]:
    """Names of all scorers, those first that stand by themselves."""
    return (*SCORERS, PROBE, ENSEMBLE)


def is_relative(scorer: str) -> bool:
    """Whether the scorer only compares a prompt's answers with each other."""
    return scorer in SCORERS and SCORERS[scorer].relative


def cases_of(group: PromptGroup, responses: Iterable[Response]) -> list[Case]:
    """The finished ones of `responses`, each held against the group's finished candidates."""
    rivals = tuple(r for r in group.candidates if r.finished)
    return [Case(group.prompt, r, rivals) for r in responses if r.finished]


def ensemble(members: Mapping[str, Member], raws: Mapping[str, Sequence[Raw | None]]) -> list[Raw | None]:
    """Per case the mean of the members' standardised raw values, in standard deviations; None where a member gives none.

    spread: that of the mean, the members taken as independent.
    """
    out: list[Raw | None] = []
    for values in zip(*raws.values(), strict=True):
        if any(v is None for v in values):
            out.append(None)
            continue
        standard = [
            Raw((v.value - m.mean) / m.deviation, v.spread / m.deviation) for v, m in zip(values, members.values(), strict=True) if v
        ]
        n = len(standard)
        out.append(Raw(math.fsum(s.value for s in standard) / n, math.sqrt(math.fsum(s.spread**2 for s in standard)) / n))
    return out


def _asked(objectives: Sequence[Objective], judgements: Mapping[str, Judgement]) -> dict[str, list[Objective]]:
    """scorer -> the objectives that need it, themselves or in an ensemble."""
    out: dict[str, list[Objective]] = {}
    for o in objectives:
        how = judgements[o.name]
        for scorer in how.members if how.scorer == ENSEMBLE else (how.scorer,):
            out.setdefault(scorer, []).append(o)
    return out
