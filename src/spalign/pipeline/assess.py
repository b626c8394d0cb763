"""A judged evaluation, stage by stage on disk: the models' answers, what a judge says of them (Inspect), and utility; then the figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import AssessConfig, SampleConfig
from spalign.constitution import Objective
from spalign.engines.make import give_memory_back, identify, load_engine
from spalign.errors import ConfigError, PromptError
from spalign.evaluation.inspect_tasks import Case, Read, judge_cases
from spalign.evaluation.judges import AskedJudge, Judge
from spalign.evaluation.mt_bench import load_questions
from spalign.pipeline.assess_judge import asked_judge, check_asked, own_judge, score_read
from spalign.pipeline.context import EngineFactory, Policy
from spalign.pipeline.evaluate import groups_of
from spalign.pipeline.figures import Judged, figures
from spalign.report import Progress, assess_table
from spalign.rollout import sample
from spalign.selfeval import load_judge, load_labelled
from spalign.store import Row, RunFolder, Stage, run_in_parts, write_atomic, write_json
from spalign.types import Prompt, PromptGroup, Response, group_to_json

_AT_ONCE = 1024
"""Answers that wait for a judge of ours, which takes what waits as one batch."""


def assess(config: AssessConfig, *, ui: Progress | None = None, make_engine: EngineFactory | None = None) -> dict[str, Any]:
    """`spalign judge`: answers, judges and compares; the figures, which are also in results.json and table.md of the folder.

    What is on disk of the same inputs is not done again. make_engine: for engines of your own. Raises SpalignError with the fix.
    """
    found = figures([judged(config, ui=ui, make_engine=make_engine)])
    write_json(config.folder / "results.json", found)
    write_atomic(config.folder / "table.md", assess_table(found).encode())
    return found


def check(config: AssessConfig) -> None:
    """Everything that can be seen without a model: packages, prompts and their overlap, questions, the judge. Raises SpalignError."""
    _Assessment(config, Progress(quiet=True), None)
    if config.judge and config.judge.own:
        identify(config.judge.own, config.judge.engine or config.engine)


def judged(config: AssessConfig, *, ui: Progress | None = None, make_engine: EngineFactory | None = None) -> Judged:
    """Everything that models are needed for; as `assess`."""
    work = _Assessment(config, ui or Progress(quiet=True), make_engine)
    work.folder.open()
    try:
        return work.do()
    finally:
        work.folder.close()


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"this needs the package {package}, which is not installed", hint=f"pip install 'spalign[{extra}]'")


class _Assessment:
    """One evaluation in progress; everything that needs no model is checked when it is made."""

    def __init__(self, config: AssessConfig, ui: Progress, make_engine: EngineFactory | None) -> None:
        self.config, self.ui = config, ui
        _need("inspect_ai", "eval")
        if config.mmlu:
            _need("lm_eval", "eval")
            from spalign.evaluation.mmlu import load_mmlu

            load_mmlu(config.mmlu)
        self.folder = RunFolder(config.folder)
        self.folder.tell = self.ui.line
        self.constitution = config.constitution_loaded()
        self.objectives = self.constitution.objectives
        self._make = make_engine or (lambda name: load_engine(name, config.engine))
        self._given = make_engine
        self.prompts = self._load_prompts()
        self.questions = load_questions(config.mt_bench) if config.mt_bench else []
        self.policies = {label: Policy(name, identify(name, config.engine), self._make) for label, name in config.models.items()}
        if config.judge and config.judge.judge_file:
            load_judge(Path(config.judge.judge_file))
        elif config.judge and config.judge.own:
            load_labelled(None, [o.name for o in self.objectives])  # for its check: there are some of every objective
        self.judge: Judge
        self.asked = asked_judge(config.judge) if config.judge and not config.judge.own else None
        if self.asked and any(self._answers(label, "answers", self.prompts).manifest() is None for label in self.policies):
            self.asked.check()  # before any model answers

    def _load_prompts(self) -> list[Prompt]:
        config = self.config
        if config.prompts is None:
            return []
        found = prompt_sets.load_prompts(config.prompts, config.prompts_config, note=lambda text: self.ui.line(f"note: {text}"))
        for source in config.trained_on:
            prompt_sets.check_disjoint(prompt_sets.load_prompts(source, config.prompts_config), found)
        return found

    def do(self) -> Judged:
        config, asked = self.config, self.asked
        answers: dict[str, Stage] = {}
        turns: dict[str, tuple[Stage, Stage]] = {}
        mmlu: dict[str, list[int]] = {}
        for label, policy in self.policies.items():
            if self.prompts:
                answers[label] = self._answered(label, policy, "answers", self.prompts)
            if config.mt_bench:
                turns[label] = self._two_turns(label, policy)
            policy.free()
            if config.mmlu:
                mmlu[label] = self._mmlu(label, policy)
        if not answers and not turns:
            return Judged(config, [o.name for o in self.objectives], self.prompts, None, {}, {}, mmlu, {})
        try:
            return self._read(asked, answers, turns, mmlu)
        finally:
            if asked:
                asked.close()

    def _read(
        self, asked: AskedJudge | None, answers: dict[str, Stage], turns: dict[str, tuple[Stage, Stage]], mmlu: dict[str, list[int]]
    ) -> Judged:
        """What the judge says of it all."""
        config = self.config
        assert config.judge is not None
        if asked is None:
            self.judge, check = own_judge(config, self.constitution, self.folder, self.ui, self._given)
        else:
            self.judge = asked
            check = check_asked(asked, self.objectives, config.check, self._asked_once)
        baseline, *others = config.models
        return Judged(
            config,
            [o.name for o in self.objectives],
            self.prompts,
            {"model": config.judge.model, "scale": list(self.judge.scale), "asks": self.judge.asks, "check": check},
            {label: self._judged(label, stage) for label, stage in answers.items()},
            {o: self._compared(baseline, answers[baseline], o, answers[o]) for o in others} if config.pairwise and answers else {},
            mmlu,
            {label: self._mt_judged(label, stages) for label, stages in turns.items()},
        )

    # answers

    def _answers(self, label: str, name: str, prompts: Sequence[Prompt]) -> Stage:
        """The stage of a model's answers."""
        config = self.config
        inputs = {
            "policy": self.policies[label].digest,
            "prompts": prompt_sets.sha256(prompts),
            "sample": self._settings.model_dump(),
            "seed": config.seed,
            "engine": config.engine.matters(),
            "shard_size": config.shard_size,
        }
        return self.folder.stage(f"{label}/{name}", inputs)

    @property
    def _settings(self) -> SampleConfig:
        own = self.config.answer
        changes = {"n": own.samples, "temperature": own.temperature, "top_p": own.top_p, "max_new_tokens": own.max_new_tokens}
        return SampleConfig().model_copy(update=changes)

    def _answered(self, label: str, policy: Policy, name: str, prompts: Sequence[Prompt]) -> Stage:
        config, settings, stage = self.config, self._settings, self._answers(label, name, prompts)
        if stage.manifest() is not None:
            return stage
        room = policy.engine.window - settings.max_new_tokens
        for p in prompts:
            if (n := len(policy.engine.encode_chat(p.messages))) > room:
                raise PromptError(
                    f"prompt '{p.id}' has {n} tokens, and '{label}' has room for {room} beside answer.max_new_tokens",
                    hint="leave it out, or lower answer.max_new_tokens",
                )
        engine = policy.engine.of_stage(stage)
        with self.ui.stage(f"{label}: {name}", len(prompts) * settings.n, "answers") as engine.tick:

            def work(shard: Sequence[Prompt]) -> list[Row]:
                found = sample(engine, shard, self.constitution.bare(), settings, seed=config.seed, purpose="judged")
                return [group_to_json(g) for g in found]

            run_in_parts(stage, prompts, config.shard_size, work, crew=engine)
        return stage

    def _two_turns(self, label: str, policy: Policy) -> tuple[Stage, Stage]:
        one = [q.first for q in self.questions]
        first = self._answered(label, policy, "mt-bench-1", one)
        by_id = {g.prompt.id: g.candidates[0].text for g in groups_of(first)}
        two = [q.after(by_id[q.first.id]) for q in self.questions]
        return first, self._answered(label, policy, "mt-bench-2", two)

    def _mmlu(self, label: str, policy: Policy) -> list[int]:
        from spalign.evaluation.mmlu import mmlu

        config = self.config
        assert config.mmlu is not None
        path = config.mmlu.file
        stage = self.folder.stage(
            f"{label}/mmlu",
            {
                "policy": policy.digest,
                "mmlu": config.mmlu.model_dump(exclude={"batch_size"}),
                "file": sha256(path.read_bytes()).hexdigest() if path else None,
                "engine": config.engine.matters(),
            },
        )
        if stage.manifest() is None:
            began = time.perf_counter()
            stage.begin()
            self.ui.line(f"{label}: MMLU by lm-eval")
            stage.write_part(0, mmlu(policy.name, config.mmlu, config.engine.here()))
            stage.finish(seconds=round(time.perf_counter() - began, 3))
            give_memory_back()
        return [row["correct"] for row in stage.rows()]

    # judging

    def _run_judge(self, stage: Stage, name: str, cases: Sequence[Case], reads: Mapping[str, Read]) -> dict[str, dict[str, Any]]:
        """Case id -> reading -> {value, said}: from the stage, or by the judge, whose logs are in the stage's folder."""
        if stage.manifest() is None:
            began = time.perf_counter()
            stage.begin()
            judge = self.config.judge
            assert judge is not None
            self.ui.line(f"{name}: {len(cases)} answers judged by {judge.model}")
            at_once = _AT_ONCE if judge.own else judge.connections
            found = judge_cases(name, cases, reads, stage.folder / "logs", at_once=at_once)
            stage.write_part(0, [{"id": c.id, "readings": found[c.id]} for c in cases])
            unparsed = {key: sum(row[key]["value"] is None for row in found.values()) for key in reads}
            stage.finish(items=len(cases), unparsed=unparsed, seconds=round(time.perf_counter() - began, 3))
        return {row["id"]: row["readings"] for row in stage.rows()}

    def _inputs(self, **more: Any) -> dict[str, Any]:
        return {"judge": self.judge.identity, "objectives": [[o.name, o.principle] for o in self.objectives], **more}

    def _judged(self, label: str, answers: Stage) -> list[PromptGroup]:
        """The answers, scored."""
        groups = groups_of(answers)
        cases = [Case(r.id, g.prompt, r.text) for g in groups for r in g.candidates]
        reads = {o.name: score_read(self.judge, o) for o in self.objectives}
        found = self._run_judge(
            self.folder.stage(f"{label}/judged", self._inputs(answers=answers.digest)), f"scores of {label}", cases, reads
        )

        def scored(response: Response) -> Response:
            known = {name: reading["value"] for name, reading in found[response.id].items() if reading["value"] is not None}
            return dataclasses.replace(response, scores=known)

        return [g.replace(candidates=tuple(map(scored, g.candidates))) for g in groups]

    def _compared(self, baseline: str, theirs: Stage, label: str, mine: Stage) -> dict[str, list[tuple[str, float | None]]]:
        """label's first answers against the baseline's, objective by objective."""
        pairs = list(zip(groups_of(mine), groups_of(theirs), strict=True))
        cases = [Case(a.prompt.id, a.prompt, a.candidates[0].text, b.candidates[0].text) for a, b in pairs]

        def prefer(objective: Objective) -> Read:
            async def read(case: Case) -> Any:
                return await self.judge.prefer(case.prompt, case.answer, case.other, objective)

            return read

        stage = self.folder.stage(f"{label}/against-{baseline}", self._inputs(mine=mine.digest, theirs=theirs.digest))
        found = self._run_judge(stage, f"{label} against {baseline}", cases, {o.name: prefer(o) for o in self.objectives})
        return {o.name: [(c.prompt.intent, found[c.id][o.name]["value"]) for c in cases] for o in self.objectives}

    def _mt_judged(self, label: str, stages: tuple[Stage, Stage]) -> list[tuple[float | None, float | None]]:
        async def quality(case: Case) -> Any:
            return await self.judge.quality(case.prompt, case.answer, case.other)

        cases = [
            Case(g.prompt.id, g.prompt, g.candidates[0].text, q.references[turn], {"turn": turn + 1})
            for turn, stage in enumerate(stages)
            for q, g in zip(self.questions, groups_of(stage), strict=True)
        ]
        inputs = self._inputs(answers=[s.digest for s in stages], references=[q.references for q in self.questions])
        stage = self.folder.stage(f"{label}/mt-bench-judged", inputs)
        found = self._run_judge(stage, f"MT-Bench of {label}", cases, {"quality": quality})
        one, two = ([found[c.id]["quality"]["value"] for c in cases if c.facts["turn"] == turn] for turn in (1, 2))
        return list(zip(one, two, strict=True))

    def _asked_once(self, what: str, cases: Sequence[Case], reads: Mapping[str, Read]) -> dict[str, dict[str, Any]]:
        rows = [[c.prompt.text, c.answer] for c in cases]
        return self._run_judge(
            self.folder.stage(f"judge/check-{what}", self._inputs(rows=rows)), f"check of the judge, {what}", cases, reads
        )
