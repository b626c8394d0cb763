"""The whole method on one screen: its stages in order, iteration by iteration; what is done is not done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import RunConfig
from spalign.engines.base import EngineFailed
from spalign.engines.make import identify, weights_of
from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.claim import Mode, claim, write_config
from spalign.pipeline.context import Context, EngineFactory, Policy, Step
from spalign.pipeline.data import data_steps, reference_steps
from spalign.pipeline.evaluate import evaluation_steps
from spalign.pipeline.gate import gate_step, lost, priority_lost, reopen, settle
from spalign.pipeline.judging import Judging, scorers_of
from spalign.pipeline.prepare import prepare
from spalign.pipeline.publish import publish
from spalign.pipeline.report import write_report
from spalign.pipeline.summary import agreement_of, summarise
from spalign.pipeline.train import train_step
from spalign.report import Progress, print_summary
from spalign.selfeval import check_askable
from spalign.store import write_json
from spalign.types import Message, Prompt

STAGES = ("sample", "evaluate", "refine", "denoise", "pair", "train")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. summary: as in summary.json, None where only a stage was asked for. new: False if all was done before."""

    folder: Path
    summary: dict[str, Any] | None
    new: bool


def run(
    config: RunConfig,
    *,
    mode: Mode = "auto",
    only: str | None = None,
    until: str | None = None,
    ui: Progress | None = None,
    make_engine: EngineFactory | None = None,
) -> Outcome:
    """Run the method to its end, or up to a stage of its last iteration (`until`), or one stage (`only`; its inputs must be there).

    mode: `auto` starts, or goes on where an unchanged configuration stopped; `resume` goes on also under a changed configuration, doing
    again what depends on the change; `fresh` sets an old folder aside. make_engine: for engines of your own (default: transformers).
    Raises SpalignError with the fix; NothingToTrainOn (exit code 3) where no pair survives; PriorityLost (exit code 4), with the summary
    written and shown, where the priority gate does not pass.
    """
    ui = ui or Progress(quiet=True)
    context = prepare(config, ui, make_engine)
    folder = context.folder
    steps, models, judging = _plan(context)  # a model that is not there leaves no trace in the folder
    trained = [s.stage for s in steps if s.name == "train"]
    claim(context, mode)
    try:
        if only is not None:
            reopen(trained[:-1])
            _greet(context, models[0], steps)
            return _one_stage(context, steps, only)
        _greet(context, models[0], steps)
        write_config(context)
        if any(s.stage.manifest() is None for s in steps):
            reopen(trained)
        if until is not None:
            last = max(i for i, s in enumerate(steps) if s.name == until)
            return Outcome(folder.path, None, _do(steps[: last + 1], context))
        new = _do(steps, context)
        settle(trained, next(s.stage for s in steps if s.name == "gate"))
        summary = summarise(context, steps, models, judging)
        write_json(folder.path / "summary.json", summary)
        if new or not (folder.path / "report.html").exists():
            write_report(folder.path)
        publish(context, summary)
        if lost(summary["gate"]):
            if not context.ui.quiet:
                print_summary(summary, context.ui.console)
            raise priority_lost(summary["gate"])
        return Outcome(folder.path, summary, new)
    finally:
        folder.close()


def agree(
    config: RunConfig, *, mode: Mode = "auto", ui: Progress | None = None, make_engine: EngineFactory | None = None
) -> dict[str, Any]:
    """The first iteration's self-scores against those of `self_evaluation.reference_judge`, which must be named: only what that takes."""
    context = prepare(config, ui or Progress(quiet=True), make_engine)
    steps, models, judging = _plan(context)
    claim(context, mode)
    try:
        _greet(context, models[0], steps)
        write_config(context)
        first = [s for s in steps if s.stage.folder.is_relative_to(context.folder.path / "iteration-1")]
        _do([s for s in first if s.name in ("judge", "sample", "evaluate") and "/compare-" not in str(s.stage.folder)], context)
        found = agreement_of(context, steps, judging)
        assert found is not None
        return found
    finally:
        context.folder.close()


def _plan(run: Context) -> tuple[list[Step], list[Policy], Judging]:
    """Every step of the run, in order; the first policy and one after each iteration; and how the first one's answers are judged."""
    own, engine, model = run.config.self_evaluation, run.config.engine, run.config.model
    weights = weights_of(model, engine)
    policy = frozen = Policy(model, identify(model, engine), run.make_engine, served=engine.served, weights=weights)
    run.named_judge = _other(run, own.judge, policy)
    run.reference_judge = _other(run, own.reference_judge, policy)
    if _is_itself(run, run.named_judge or policy):
        raise ConfigError(
            f"self_evaluation.reference_judge: '{own.reference_judge}' is the judge itself, and would agree with itself",
            hint="name another model, or another way for it to score: self_evaluation.reference_scorer",
        )
    steps: list[Step] = []
    first: Judging | None = None
    start, policies = policy, [policy]
    for iteration, prompts in enumerate(_prompts_by_iteration(run), 1):
        base = f"iteration-{iteration}"
        data, judging = data_steps(run, base, policy, prompts, iteration)
        first = first or judging
        paired = next(s.stage for s in data if s.name == "pair")
        trained = train_step(run, base, policy, paired, prompts)
        steps += [*data, trained]
        start, policy = policy, Policy(str(trained.stage.folder / "model"), trained.stage.digest, run.make_engine, made_by=trained.stage)
        policies.append(policy)
    assert first is not None
    before = evaluation_steps(run, "before", frozen, first)
    after = evaluation_steps(run, "after", policy, first, rivals=before[0].stage)
    steps += [*before, *after, gate_step(run, first, before, after[-1].stage, [s.stage for s in steps if s.name == "train"], start)]
    if run.reference_judge:
        steps += reference_steps(run, "iteration-1", next(s.stage for s in steps if s.name == "sample"))
    return steps, policies, first


def _other(run: Context, name: str | None, policy: Policy) -> Policy | None:
    """The model `name`, which is the policy itself where it is the same model."""
    if name is None:
        return None
    engine, named = run.config.judge_engine, run.config.self_evaluation.judge_engine
    found = identify(name, engine)
    if named in (None, run.config.engine) and (name == policy.name or found == policy.digest):
        return policy
    return Policy(name, found, run.make_judge, served=engine.served)


def _is_itself(run: Context, judge: Policy) -> bool:
    """Whether the reference judge is the run's judge, asked in the same way."""
    own, reference = run.config.self_evaluation, run.reference_judge
    if reference is None or own.judge_file or any(own.scorer_of(o.name) != own.of_reference().scorer_of(o.name) for o in run.objectives):
        return False
    # other judges have one engine; the policy's may be another, and is then another judge
    return judge is reference or (judge is run.named_judge and judge.digest == reference.digest)


def _greet(run: Context, policy: Policy, steps: Sequence[Step]) -> None:
    """Before anything is asked of them: served models answer, and can do what is named. Nothing where all is done."""
    if all(s.stage.manifest() is not None for s in steps):
        return
    for other in (policy, run.named_judge, run.reference_judge):
        if other and other.served:
            _ = other.engine  # asks the server what it can do
    if policy.served:
        policy.engine.encode_chat((Message("user", "Hello"),))  # training needs the tokenizer
    if run.reference_judge and run.reference_judge.served:  # it is asked last
        check_askable(
            run.reference_judge.engine.inner, run.objectives, scorers_of(run.objectives, run.config.self_evaluation.of_reference())
        )


def _do(steps: Sequence[Step], run: Context) -> bool:
    """Do what is not done, in order: what is done again may be other than it was, and then what was made from it is not done, either.

    True if there was anything.
    """
    did = False
    for step in steps:
        if step.stage.manifest() is not None:
            continue
        did = True
        if run.config.data_from and step.stage.take_from(Path(run.config.data_from) / step.stage.folder.relative_to(run.folder.path)):
            continue
        try:
            step.do()
        except EngineFailed as e:
            e.hint += "; everything finished is kept, and the same command goes on"
            raise
    return did


def _one_stage(run: Context, steps: Sequence[Step], only: str) -> Outcome:
    """Do the stage named `only` of the first iteration that lacks it; the stages before it must be done."""
    steps = [s for s in steps if "/compare-" not in str(s.stage.folder) and "/reference/" not in str(s.stage.folder)]
    last = max(i for i, s in enumerate(steps) if s.name == only)
    wanted = next((i for i, s in enumerate(steps) if s.name == only and s.stage.manifest() is None), last)
    for before in steps[:wanted]:
        if before.stage.manifest() is None and before.name not in (only, "judge"):
            raise RunFolderError(
                f"'{only}' needs the stage '{before.name}' ({before.stage.folder}), which is not done",
                hint=f"run: spalign {before.name} CONFIG",
            )
    write_config(run)
    checks = [s for s in steps[:wanted] if s.name == "judge"]  # no command of its own: it is done where it is needed
    return Outcome(run.folder.path, None, _do([*checks, steps[wanted]], run))


def _prompts_by_iteration(run: Context) -> list[list[Prompt]]:
    """The same prompts for every iteration, or with `new_prompts` each its own share."""
    n = run.config.iterations
    if not run.config.new_prompts:
        return [run.train_prompts] * n
    return [run.train_prompts[i::n] for i in range(n)]
