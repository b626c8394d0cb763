"""judge-check: how well can this model judge, asked in which way? Measured on labelled answers, per objective and scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spalign.constitution import Objective
from spalign.engines.base import Engine, EngineFailed
from spalign.errors import ConfigError, EngineError, SpalignError
from spalign.selfeval.bench import Bench
from spalign.selfeval.evaluate import ENSEMBLE, SCORERS
from spalign.selfeval.labelled import LabelledCase
from spalign.selfeval.probe import PROBE, check_probe
from spalign.selfeval.report import MAX_INJECTION_SHIFT, JudgeCheck, ScorerReport


def judge_check(
    engine: Engine,
    objectives: Sequence[Objective],
    labelled: Sequence[LabelledCase],
    scorers: Sequence[str],
    *,
    recall: float | None = None,
    diagnose_all: bool = True,
    tick: Callable[[int], None] = lambda _: None,
) -> JudgeCheck:
    """Measure `scorers` on the labelled answers of each objective, and recommend one.

    That is the one with the highest lower bound of the AUC on the kind of text that it is worst at, if that is above one half; else on all.

    recall: choose the threshold that leaves this share of the bad answers below it, instead of equal errors. diagnose_all: measure retest,
    flips and injections of all scorers, not only of the one that would be recommended. tick: called with the number of answers read.
    A scorer that the engine cannot serve is skipped with the reason. Raises EngineError where none can be asked.
    """
    if unknown := [n for n in scorers if n not in (*SCORERS, PROBE, ENSEMBLE)]:
        raise ConfigError(f"no scorer '{unknown[0]}'", hint=f"use some of: {', '.join((*SCORERS, PROBE, ENSEMBLE))}")
    skipped: dict[str, str] = {}
    reports: dict[str, dict[str, ScorerReport]] = {}
    recommended: dict[str, str] = {}
    for o in objectives:
        usable = _usable(engine, o, [n for n in scorers if n != ENSEMBLE], skipped)
        bench = Bench(engine, o, [c for c in labelled if c.objective == o.name], recall, tick)
        by = {name: bench.report(name) for name in usable if name != PROBE or bench.fit()}
        if PROBE in usable and PROBE not in by:
            skipped[PROBE] = f"too few labelled answers of '{o.name}' to fit it on"
        if ENSEMBLE in scorers and len(members := _members(by)) >= 2:
            by[ENSEMBLE] = bench.report(ENSEMBLE, members)
        reports[o.name], chosen = _diagnosed(bench, by, diagnose_all)
        if chosen:
            recommended[o.name] = chosen
    return JudgeCheck(reports, recommended, skipped)


def check_askable(engine: Engine, objectives: Sequence[Objective], scorers: Mapping[str, Sequence[str]]) -> None:
    """Refuse, before any work starts, an engine that can serve none of an objective's scorers (objective -> names)."""
    for o in objectives:
        _usable(engine, o, [n for n in scorers[o.name] if n != ENSEMBLE], {})


def _usable(engine: Engine, objective: Objective, scorers: Sequence[str], skipped: dict[str, str]) -> list[str]:
    """Those of `scorers` that the engine can serve; why not the others, into `skipped`. Raises EngineError where it is none."""
    usable = []
    for name in scorers:
        try:
            check_probe(engine) if name == PROBE else SCORERS[name].check(engine, [objective])
            usable.append(name)
        except EngineFailed:
            raise
        except SpalignError as e:
            skipped[name] = e.message
    if not usable:
        raise EngineError(
            f"objective '{objective.name}': no scorer can be asked: " + "; ".join(skipped.values()),
            hint="name the scorer likert, which only generates, or use an engine with log-probabilities; give the objective exemplars",
        )
    return usable


def _members(by: Mapping[str, ScorerReport]) -> list[str]:
    """An ensemble is of absolute scorers that know something: whose AUC is surely above one half."""
    return [n for n, r in by.items() if r.judgement is not None and r.auc_ci[0] > 0.5]


def _diagnosed(bench: Bench, by: dict[str, ScorerReport], every: bool) -> tuple[dict[str, ScorerReport], str | None]:
    """The reports with diagnostics, and the scorer to recommend: of those that injections do not move, the best; else the best of all."""
    ranked = sorted((n for n, r in by.items() if r.judgement is not None), key=lambda n: by[n].rank, reverse=True)
    chosen: str | None = None
    for name in ranked + [n for n in by if n not in ranked]:
        if every or (chosen is None and name in ranked):
            by[name] = bench.diagnosed(name, by[name])
        if chosen is None and name in ranked and not _moved(by[name]):
            chosen = name
    return by, chosen or (ranked[0] if ranked else None)


def _moved(report: ScorerReport) -> bool:
    return report.injection_shift is not None and report.injection_shift >= MAX_INJECTION_SHIFT
