"""The priority gate: a model whose primary objective is not shown to hold is kept under another name; an earlier one is proposed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.engines.base import Engine
from spalign.errors import PriorityLost, RunFolderError
from spalign.evaluation import GateResult, primary_gate
from spalign.pipeline.checkpoints import KEPT, hand_over, kept_checkpoints, step_of
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.evaluate import evaluation_steps, groups_of
from spalign.pipeline.judging import Judging
from spalign.report.card_facts import answers_of, called
from spalign.store import Stage, clear_errors

FAILED = "-failed-gate"


def gate_step(run: Context, judging: Judging, before: Sequence[Step], after: Stage, trained: Sequence[Stage], start: Policy) -> Step:
    """evaluation/gate: whether the last model is handed over.

    before: the steps of the evaluation before training. after: the judged answers of the model. trained: the training stage of every
    iteration; the last one led from `start` to the model.
    """
    config = run.config
    inputs = {
        "before": before[-1].stage.digest,
        "after": after.digest,
        "objective": run.objectives[0].name,
        "gate": config.evaluation.gate.model_dump(),
        "bootstrap": config.evaluation.bootstrap,
        "seed": config.seed,
    }
    stage = run.folder.stage("evaluation/gate", inputs, before[-1].stage, after)
    gate = _Gate(run, judging, before, trained, start)
    return Step("gate", stage, lambda: gate.do(stage, after))


@dataclass(frozen=True)
class _Gate:
    """As `gate_step`."""

    run: Context
    judging: Judging
    before: Sequence[Step]
    trained: Sequence[Stage]
    start: Policy

    @property
    def folder(self) -> Path:
        return self.trained[-1].folder

    def do(self, stage: Stage, after: Stage) -> dict[str, Any]:
        """The model's result; where it fails, those of earlier ones until one passes. The manifest is written when names say so."""
        stage.begin()
        objective, enabled = self.run.objectives[0].name, self.run.config.evaluation.gate.enabled
        result = self._result(after)
        self._tell("the trained model", result)
        tried: list[dict[str, Any]] = []
        seconds, tokens = 0.0, 0
        if enabled and not result.passed:
            for which, found, manifests in self._tries():
                self._tell(called(which), found)
                seconds += sum(m["seconds"] for m in manifests)
                tokens += sum(m["tokens"] for m in manifests)
                tried.append({**which, **found.to_json(), "text": found.text(objective)})
                if found.passed:  # it is the one that is proposed
                    break
        facts = {
            "objective": objective,
            "enforced": enabled,
            **result.to_json(),
            "text": result.text(objective),
            "wanted_prompts": result.wanted_prompts(),
            "checkpoints": tried,
        }
        _settle(self.trained, facts)
        return stage.finish(gate=facts, seconds=round(seconds, 3), tokens=tokens)

    def _result(self, judged: Stage) -> GateResult:
        config = self.run.config
        before, after = groups_of(self.before[-1].stage), groups_of(judged)
        name = self.run.objectives[0].name
        return primary_gate(before, after, name, config.evaluation.gate, resamples=config.evaluation.bootstrap, seed=config.seed)

    def _tries(self) -> Iterator[tuple[dict[str, int | None], GateResult, list[dict[str, Any]]]]:
        """Each as it is asked for, newest first: kept checkpoints of the last iteration, then the models of the iterations before it, which
        stay as and where they are."""
        last = len(self.trained)
        for checkpoint in kept_checkpoints(self.folder):
            yield {"iteration": last, "step": step_of(checkpoint)}, *self._try(checkpoint)
        for iteration in range(last - 1, 0, -1):
            stage = self.trained[iteration - 1]
            model = stage.folder / "model"
            if model.is_dir():
                policy = Policy(str(model), stage.digest, self.run.make_engine, made_by=stage)
                yield {"iteration": iteration, "step": None}, *self._judged(f"iteration-{iteration}", policy)

    def _judged(self, name: str, policy: Policy) -> tuple[GateResult, list[dict[str, Any]]]:
        """The policy's held-out answers, judged as those of the model; they are in `evaluation/{name}`."""
        steps = evaluation_steps(self.run, name, policy, self.judging, rivals=self.before[0].stage)
        manifests = [step.stage.manifest() or step.do() for step in steps]
        policy.free()
        return self._result(steps[-1].stage), manifests

    def _try(self, checkpoint: Path) -> tuple[GateResult, list[dict[str, Any]]]:
        """A kept checkpoint, which stays handed over only if it passes."""
        suffix = f"-{checkpoint.name}"
        target = self.folder / f"model{suffix}"

        def made() -> None:
            if not target.exists():
                with clear_errors(self.folder):
                    code = self.run.config.engine.trust_remote_code
                    hand_over(checkpoint, self.folder, str(self.start.weights), trust_remote_code=code, suffix=suffix)

        def load(name: str) -> Engine:
            made()
            return self.run.make_engine(name)

        policy = Policy(str(target), f"{self.trained[-1].digest}/{checkpoint.name}", load, made_by=self.trained[-1])
        result, manifests = self._judged(checkpoint.name, policy)
        if result.passed:
            made()
        else:
            for made_of_it in (target, self.folder / f"adapter{suffix}"):
                shutil.rmtree(made_of_it, ignore_errors=True)
        return result, manifests

    def _tell(self, what: str, result: GateResult) -> None:
        verdict = {"held": "holds", "lost": "LOST", "not shown": "NOT SHOWN"}[result.verdict]
        text = result.text(self.run.objectives[0].name)
        self.run.ui.line(f"priority gate, {what}: {verdict}; {text}", style="" if result.passed else "red")


def settle(trained: Sequence[Stage], gate: Stage) -> None:
    """Give the last model the name that the finished gate says it deserves."""
    _settle(trained, (gate.manifest() or {})["gate"])


def _settle(trained: Sequence[Stage], facts: Mapping[str, Any]) -> None:
    """Where the model is handed over, the kept checkpoints that might have replaced it go."""
    last = trained[-1].folder
    with clear_errors(last):
        if lost(facts):
            _rename(last, "", FAILED)
            return
        _rename(last, FAILED, "")
        for stage in trained:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(stage.folder / KEPT)


def reopen(trained: Sequence[Stage]) -> None:
    """Before more is done with finished models: they have their ordinary names again, under which stages load them."""
    for stage in trained:
        if (stage.folder / f"model{FAILED}").exists() and stage.manifest() is not None:
            with clear_errors(stage.folder):
                _rename(stage.folder, FAILED, "")


def _rename(folder: Path, old: str, new: str) -> None:
    for part in ("adapter", "model"):
        source, target = folder / f"{part}{old}", folder / f"{part}{new}"
        if source.exists():
            if target.exists():
                raise RunFolderError(f"{folder} has both {source.name} and {target.name}", hint="move one of them out of the run folder")
            source.rename(target)


def lost(facts: Mapping[str, Any]) -> bool:
    """Whether the gate keeps the model from being handed over."""
    return bool(facts["enforced"] and not facts["passed"])


def priority_lost(gate: Mapping[str, Any]) -> PriorityLost:
    """The error that ends such a run; gate: as in summary.json."""
    objective, tried = gate["objective"], gate["checkpoints"]
    what = (
        f"the trained model lost its primary objective: {gate['text']}"
        if gate["verdict"] == "lost"
        else f"it is not shown that the trained model's primary objective holds: {gate['text']}"
    )
    if (proposed := gate["proposed"]) is not None:
        others = f"{called(proposed)} passes and is proposed instead: {proposed['path']}"
        advice = [f"read answers of the proposed model in {answers_of(proposed)} before you use it"]
    else:
        checkpoints = sum(t["step"] is not None for t in tried)
        others = (
            f"none of {checkpoints} earlier checkpoints of the last iteration passes"
            if checkpoints
            else "no earlier checkpoint of the last iteration was kept"
        )
        if checkpoints < len(tried):
            others += ", and no earlier iteration's model passes"
        advice = []
    if gate["verdict"] == "lost":
        advice += ["try a smaller train.learning_rate or fewer epochs; see which pairs the primary decided (funnel.decided_by)"]
    elif gate["prompts"]:
        wanted = f" (about {gate['wanted_prompts']} would do if the difference stays)" if gate["wanted_prompts"] else ""
        advice += [f"give more held-out prompts{wanted} or evaluation.samples, or try a smaller train.learning_rate"]
    else:
        advice += [f"see why the judge cannot score '{objective}': evaluation/after/2-judge"]
    return PriorityLost(f"{what}\n  the model is kept as {gate['failed_path']}; {others}", hint="; or ".join(advice))
