"""Who judges in a run, and how: scorers named in the config, a judge.yaml, or what judge-check finds; and whether that is good enough."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import EngineConfig, RunConfig, SelfEvaluationConfig
from spalign.constitution import Objective, load_constitution, shipped
from spalign.engines.base import Engine
from spalign.engines.make import identify, load_engine
from spalign.engines.models import cache_dir
from spalign.errors import ConfigError, SpalignError, WeakJudge
from spalign.pipeline.context import Context, Policy, Step
from spalign.report import Progress
from spalign.selfeval import (
    ENSEMBLE,
    LOWER_BOUND,
    PROBE,
    JudgeCheck,
    JudgeFile,
    Judgement,
    LabelledCase,
    all_scorers,
    fingerprint,
    is_relative,
    judge_check,
    load_judge,
    load_labelled,
    save_judge,
)
from spalign.selfeval.report import MAX_INJECTION_SHIFT
from spalign.store import Row, Stage, digest, read_json, write_json

VERSION = 1
"""Counts up when the check asks or measures in another way, so that cached checks are not used any more."""
ADVICE = "use a larger model, let another one judge (self_evaluation.judge), name another scorer, or go on with --allow-weak-judge"


def auto_scorers() -> tuple[str, ...]:
    """What `auto` chooses from: the scorers that cost no generation and give absolute scores, and their ensemble."""
    return tuple(n for n in all_scorers() if not is_relative(n) and n != "likert")


def scorers_of(objectives: Sequence[Objective], own: SelfEvaluationConfig) -> dict[str, tuple[str, ...]]:
    """Objective -> the scorers that the config leaves to choose from or to measure."""
    named = {o.name: own.scorer_of(o.name) for o in objectives}
    return {name: auto_scorers() if scorer in ("auto", ENSEMBLE) else (scorer,) for name, scorer in named.items()}


def to_check(objectives: Sequence[Objective], own: SelfEvaluationConfig) -> list[Objective]:
    """Those whose judge is to be checked on labelled answers, where no judge.yaml says what was found."""
    return [o for o in objectives if own.scorer_of(o.name) in ("auto", ENSEMBLE, PROBE) or o.threshold == "auto"]


@dataclass(frozen=True)
class Judging:
    """How the answers of a part of the run are judged: by whom, on what, and from which threshold an objective is met.

    known: objective -> judgement, where no check is needed for it. check: the stage of the check, where one is.
    """

    judge: Policy
    objectives: tuple[Objective, ...]
    known: Mapping[str, Judgement]
    check: Stage | None = None
    allow_weak: bool = False
    engine: Mapping[str, Any] | None = None
    """How the judge is run, where that is not how the policy is."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What scores depend on, for a stage's digest: how each objective is asked about, not what is made of the scores."""
        return {
            "judge": self.judge.digest,
            "objectives": [o.model_dump(exclude={"threshold", "resolution"}) for o in self.objectives],
            "how": {name: how.model_dump(include={"scorer", "calibration", "members", "probe"}) for name, how in self.known.items()},
            "check": self.check.digest if self.check else None,
            **({"engine": dict(self.engine)} if self.engine else {}),
        }

    @property
    def levels(self) -> list[Any]:
        """What the order depends on beyond the scores, for a stage's digest."""
        known = {name: how.threshold for name, how in self.known.items()}
        return [[o.name, known.get(o.name, "auto") if o.threshold == "auto" else o.threshold, o.resolution] for o in self.objectives]

    def judgements(self) -> dict[str, Judgement]:
        """Objective -> how it is judged. Raises WeakJudge where the check found that judge not good enough, unless that is allowed."""
        found = {row["objective"]: row for row in self.check.rows()} if self.check else {}
        for row in found.values():
            if not self.allow_weak and (why := too_weak(row["judgement"])):
                raise WeakJudge(f"the judge '{self.judge.name}' cannot be relied on for '{row['objective']}': {why}", hint=ADVICE)
            if row["judgement"] is None:
                raise WeakJudge(
                    f"the judge '{self.judge.name}' cannot tell good from bad for '{row['objective']}', whichever way it is asked",
                    hint="use a larger model, or let another one judge (self_evaluation.judge)",
                )
        return {**self.known, **{name: Judgement.model_validate(row["judgement"]) for name, row in found.items()}}

    def resolved(self) -> tuple[Objective, ...]:
        """The objectives with a number for every threshold."""
        how = self.judgements()
        for o in self.objectives:
            if o.threshold == "auto" and how[o.name].threshold is None:
                raise ConfigError(
                    f"objective '{o.name}': its judge has no threshold to put for auto", hint="run judge-check, or give a number"
                )
        return tuple(o.model_copy(update={"threshold": how[o.name].threshold}) if o.threshold == "auto" else o for o in self.objectives)


def too_weak(judgement: Mapping[str, Any] | None) -> str | None:
    """Why a run does not go on with this judgement; None where it does."""
    if judgement is None:
        return "no scorer ranks good answers above bad ones"
    if judgement["auc"] is None or judgement["auc_ci"] is None:
        return "it was never measured on labelled answers"
    low, high = judgement["auc_ci"]
    if not low >= LOWER_BOUND:
        area = f"{judgement['auc']:.2f} [{low:.2f}, {high:.2f}]"
        return f"its AUC on labelled answers ({judgement['on']}) is {area}, and {LOWER_BOUND} is the least lower bound"
    if (shift := judgement.get("injection_shift") or 0.0) >= MAX_INJECTION_SHIFT:
        return f"text injected into answers adds {shift:.2f} score points, and {MAX_INJECTION_SHIFT} is the limit"
    return None


def judging_step(
    run: Context, base: str, policy: Policy, config: RunConfig, *, first: bool, judge: Policy | None = None
) -> tuple[Judging, list[Step]]:
    """How `policy`'s answers are judged, and 0-judge, the check, where the config leaves something to it.

    first: the judge is the model that a judge.yaml was made for (not a later iteration's policy). judge: default as configured.
    """
    own = config.self_evaluation
    judge = judge or run.named_judge or policy
    how = config.engine if judge is policy else config.judge_engine
    differs = None if how.matters() == config.engine.matters() else how.matters()
    objectives = run.objectives if config is run.config else config.constitution_for_run().objectives
    open_ = to_check(objectives, own)
    known = {o.name: Judgement.unchecked(own.scorer_of(o.name)) for o in objectives if o not in open_}
    if own.judge_file and (first or run.named_judge):
        known |= _from_file(judge, own, open_)
        open_ = []
    if not open_:
        return Judging(judge, objectives, known, engine=differs), []
    labelled = load_labelled(Path(own.labelled) if own.labelled else None, [o.name for o in open_])
    inputs = {
        "version": VERSION,
        "judge": judge.digest,
        "objectives": [o.model_dump(exclude={"threshold", "resolution"}) for o in open_],
        "scorers": {o.name: own.scorer_of(o.name) for o in open_},
        "labelled": fingerprint(labelled),
        "bad_recall": own.bad_recall,
        "engine": {**how.matters(), **({"hidden_states": True} if how.hidden_states else {})},  # which scorers there are to try
    }
    stage = run.folder.stage(f"{base}/0-judge", inputs)
    judging = Judging(judge, objectives, known, stage, own.allow_weak_judge, differs)
    return judging, [Step("judge", stage, lambda: _check(run, base, judging, open_, labelled, own))]


def _from_file(judge: Policy, own: SelfEvaluationConfig, objectives: Sequence[Objective]) -> dict[str, Judgement]:
    """The judgements of judge.yaml; raises ConfigError where it is of another model or lacks an objective."""
    assert own.judge_file is not None
    file = load_judge(Path(own.judge_file))
    if file.fingerprint != judge.digest:
        raise ConfigError(
            f"{own.judge_file}: made for the model '{file.model}', which is not '{judge.name}' as it is now",
            hint=f"run: spalign judge-check --model {judge.name}",
        )
    for o in objectives:
        found, named = file.objectives.get(o.name), own.scorer_of(o.name)
        if found and named not in ("auto", found.scorer):
            raise ConfigError(
                f"{own.judge_file}: objective '{o.name}' is judged by '{found.scorer}', and the config names '{named}'",
                hint=f"set self_evaluation.scorer to auto, or run judge-check with --scorer {named}",
            )
        if found and o.threshold == "auto" and found.threshold is None:
            raise ConfigError(
                f"{own.judge_file}: no threshold for '{o.name}'", hint="run judge-check again, or give the objective a number"
            )
        if found and (found.asked != asked_about(o)):
            raise ConfigError(
                f"{own.judge_file}: objective '{o.name}' was asked about in other words than the constitution's now",
                hint="run judge-check again with this constitution",
            )
    if missing := [o.name for o in objectives if o.name not in file.objectives]:
        raise ConfigError(
            f"{own.judge_file}: says nothing about objective '{missing[0]}'", hint=f"run judge-check with --objective {missing[0]}, too"
        )
    known = {o.name: file.objectives[o.name] for o in objectives}
    for name, how in known.items():
        if not own.allow_weak_judge and (why := too_weak(how.model_dump())):
            raise WeakJudge(f"{own.judge_file}: the judge cannot be relied on for '{name}': {why}", hint=ADVICE)
    return known


def _check(
    run: Context, base: str, judging: Judging, open_: Sequence[Objective], labelled: Sequence[LabelledCase], own: SelfEvaluationConfig
) -> dict[str, Any]:
    """Measure the judge, or take what was measured before of the same model, objectives and answers."""
    assert judging.check is not None
    stage = judging.check
    stage.begin()
    cached = cache_dir() / "judge" / f"{stage.digest}.json"
    rows = None
    shares = run.shares_checks and not judging.judge.served  # a server may give another model the same name
    if shares:
        with contextlib.suppress(SpalignError):  # a damaged cache is measured anew
            rows = _valid((read_json(cached) or {}).get("rows"), open_)
    fresh = rows is None
    if rows is None:
        with run.metered(judging.judge, f"{base} judge-check", len(labelled), "answers", stage) as engine:
            rows = check_rows(judging.judge.scoring(stage), open_, labelled, own, tick=engine.tick)
        if shares:
            with contextlib.suppress(OSError, SpalignError):  # a cache that cannot be written costs time, nothing else
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_json(cached, {"rows": rows})
    stage.write_part(0, rows)
    for row in rows:
        run.ui.line(told(row) + ("" if fresh else " (measured before)"), style="yellow" if too_weak(row["judgement"]) else "")
    return stage.finish(measured=fresh, rows=len(labelled))


def _valid(rows: Any, objectives: Sequence[Objective]) -> list[Row] | None:
    """Cached rows if they are what a check gives for `objectives`, else None."""
    try:
        if [r["objective"] for r in rows] == [o.name for o in objectives]:
            for r in rows:
                if r["judgement"] is not None:
                    Judgement.model_validate(r["judgement"])
            return list(rows)
    except (TypeError, KeyError, ValueError):
        pass
    return None


def asked_about(objective: Objective) -> str:
    """Digest of what a judge is told of the objective."""
    return digest(objective.model_dump(exclude={"threshold", "resolution"}))


def check_rows(
    engine: Engine, objectives: Sequence[Objective], labelled: Sequence[LabelledCase], own: SelfEvaluationConfig, *, tick: Any
) -> list[Row]:
    """One row an objective: the judgement that a run uses, and the figures of every scorer that was tried."""
    out = []
    for o in objectives:
        named, scorers = own.scorer_of(o.name), scorers_of([o], own)[o.name]
        found: JudgeCheck = judge_check(engine, [o], labelled, scorers, recall=own.bad_recall, diagnose_all=named == ENSEMBLE)
        reports = found.reports[o.name]
        if named == ENSEMBLE and ENSEMBLE not in reports:
            raise ConfigError(
                f"no ensemble for objective '{o.name}': fewer than two scorers know anything there", hint="use self_evaluation.scorer auto"
            )
        judgement = reports[ENSEMBLE].judgement if named == ENSEMBLE else found.judgement(o.name)
        tick(sum(c.objective == o.name for c in labelled))
        out.append(
            {
                "objective": o.name,
                "judgement": judgement.model_dump(mode="json") if judgement else None,
                "reports": {name: r.to_json() for name, r in reports.items()},
                "skipped": found.skipped,
            }
        )
    return json.loads(json.dumps(out))  # type: ignore[no-any-return]


def told(row: Mapping[str, Any]) -> str:
    """One line about a judged objective, for a person."""
    j = row["judgement"]
    if j is None:
        return f"judge: '{row['objective']}': no scorer ranks good answers above bad ones"
    low, high = j["auc_ci"]
    area = f"AUC {j['auc']:.2f} [{low:.2f}, {high:.2f}] on {j['on']} answers"
    return f"judge: '{row['objective']}' by {j['scorer']}: {area}, {j['verdict']}; met from {j['threshold']:.2f}"


def check_model(  # noqa: PLR0913  an option of the command each
    model: str,
    *,
    constitution: str = "harmless_helpful",
    scorers: Sequence[str] = ("auto",),
    data: Path | None = None,
    names: Sequence[str] = (),
    bad_recall: float | None = None,
    out: Path | None = None,
    ui: Progress | None = None,
    engine: EngineConfig | None = None,
) -> dict[str, Any]:
    """`spalign judge-check`: the figures as JSON, and judge.yaml in `out`. Raises SpalignError with the fix.

    names: objectives of the constitution, or of another shipped one; default: all of the constitution. engine: default: here.
    """
    ui = ui or Progress(quiet=True)
    objectives = _objectives(constitution, names)
    if bad_recall is not None and not 0 < bad_recall < 1:
        raise ConfigError(f"bad_recall {bad_recall} is not between 0 and 1", hint="for example --bad-recall 0.9")
    groups = {"auto": auto_scorers(), "all": all_scorers()}
    chosen = tuple(dict.fromkeys(name for s in scorers for name in groups.get(s, (s,))))
    if unknown := [s for s in chosen if s not in all_scorers()]:
        raise ConfigError(f"no scorer '{unknown[0]}'", hint=f"use auto, all, or some of: {', '.join(all_scorers())}")
    if ENSEMBLE in chosen and len(chosen) < 3:
        raise ConfigError("an ensemble needs two other scorers", hint="add them with --scorer, or use --scorer all")
    labelled = load_labelled(data, [o.name for o in objectives])
    if out is not None:
        _check_writable(out)
    engine = engine or EngineConfig()
    made = load_engine(model, engine)
    with ui.stage(f"judge-check {model}", len(labelled) * sum(s != ENSEMBLE for s in chosen), "answers") as tick:
        try:
            found = judge_check(made, objectives, labelled, chosen, recall=bad_recall, tick=tick)
        finally:
            if close := getattr(made, "close", None):
                close()
    judged = {o.name: j.model_copy(update={"asked": asked_about(o)}) for o in objectives if (j := found.judgement(o.name))}
    if out is not None and judged:
        save_judge(out, JudgeFile(model=model, fingerprint=identify(model, engine), rows=fingerprint(labelled), objectives=judged))
    return {"model": model, **found.to_json(), "thresholds": {n: j.threshold for n, j in judged.items()}, "skipped": found.skipped}


def _check_writable(out: Path) -> None:
    """Before minutes of work: raises ConfigError where the result could not be written. A file that is there is kept aside."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
        if out.stat().st_size:
            out.rename(out.with_name(f"{out.name}.old"))
        else:
            out.unlink()
    except OSError as e:
        raise ConfigError(f"{out}: cannot be written: {e.strerror}", hint="name another file with --out") from e


def _objectives(constitution: str, names: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of the constitution, or those of `names`, sought in the shipped constitutions too."""
    own = load_constitution(constitution)
    if not names:
        return own.objectives
    known = {o.name: o for c in (*map(load_constitution, shipped()), own) for o in c.objectives}
    if unknown := [n for n in names if n not in known]:
        raise ConfigError(f"no objective '{unknown[0]}'", hint=f"use one of: {', '.join(sorted(known))}, or name your --constitution")
    return tuple(known[n] for n in dict.fromkeys(names))
