"""6-train: from pairs to a model, with the collapse guard; resumable from its checkpoints."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spalign.config import OUTLETS
from spalign.engines.make import give_memory_back
from spalign.errors import NothingToTrainOn
from spalign.pipeline.checkpoints import KEPT, hand_over, last_checkpoint, step_of
from spalign.pipeline.context import Context, Policy, Step
from spalign.pipeline.job import TrainJob, train_job
from spalign.pipeline.launch import launched
from spalign.pipeline.launch_file import processes_of
from spalign.report.progress import Tick
from spalign.report.terminal import print_funnel
from spalign.store import Stage, clear_errors, read_json, write_json
from spalign.types import Prompt


def train_step(run: Context, base: str, policy: Policy, paired: Stage, prompts: Sequence[Prompt]) -> Step:
    """Trains `policy` on the pairs of `paired`; the model lands in `6-train/model`, safetensors only."""
    settings = run.config.train.model_dump(exclude={"keep_checkpoints", *OUTLETS})
    inputs = {"from": paired.digest, "policy": policy.digest, "train": settings, "seed": run.config.seed}
    stage = run.folder.stage(f"{base}/6-train", inputs, paired)
    gated = run.config.evaluation.gate.enabled and base == f"iteration-{run.config.iterations}"  # only the last model is
    keep = run.config.train.keep_checkpoints if gated else 0

    def do() -> dict[str, Any]:
        funnel = (paired.manifest() or {})["funnel"]
        if not funnel["pairs"]:
            if not run.ui.quiet:
                print_funnel(funnel, run.ui.console)
            raise NothingToTrainOn("no preference pair is left, so nothing is trained", hint=advice(funnel))
        progress = stage.begin()
        began = time.perf_counter()

        def seconds() -> float:
            return round(float(progress["seconds"]) + time.perf_counter() - began, 3)

        with clear_errors(stage.folder):
            facts = (read_json(stage.folder / "log.json") or {}).get("result")  # written last: training is over, only the rest is missing
            if facts is None:
                for other in (policy, run.named_judge, run.reference_judge):  # the trainer loads the weights in float32
                    if other is not None:
                        other.free()
                job = _job(run, base, policy, list(paired.rows()), prompts, stage.folder, keep)
                with _Shown(run, f"{base} train", lambda: stage.note(seconds=seconds(), tokens=0)) as watch:
                    trained = launched(job, watch) if run.config.train.accelerate else train_job(job, watch)
                give_memory_back()  # the engine that is next may be another process
                facts = _finish(job, trained)
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
            shutil.rmtree(stage.folder / KEPT / f"checkpoint-{facts['steps_kept']}", ignore_errors=True)  # it is `model`
        return stage.finish(seconds=seconds(), **facts)

    return Step("train", stage, do)


def advice(funnel: dict[str, Any]) -> str:
    """What to change, from where the prompts went."""
    dropped = funnel["dropped"]
    if not dropped:
        return "lower pairs.delta"
    worst = max(dropped, key=dropped.get)
    fixes = {
        "truncated": "raise sample.max_new_tokens, or ask for brevity with prompts.suffix",
        "empty": "check the model's chat template and its answers in 1-sample",
        "unscored": "the model gives no usable score: use self_evaluation.scorer=yes_no, or a larger model",
        "ceiling": "the judge gives top marks to everything: use self_evaluation.scorer=yes_no, or denoise.consistency=above_mean",
        "not dominating": "use denoise.consistency=above_mean, more refine.drafts, or refine.style=principled",
        "uninformative": "the judge says the same of every candidate: use self_evaluation.scorer=yes_no, or a higher sample.temperature",
        "unstable": "raise denoise.tau",
        "below margin": "lower pairs.delta",
    }
    return f"{dropped[worst]} of {funnel['prompts']} prompts left as '{worst}': {fixes[worst]}"


def _job(
    run: Context, base: str, policy: Policy, rows: list[dict[str, Any]], prompts: Sequence[Prompt], folder: Path, keep: int
) -> TrainJob:
    few = run.config.train.guard.prompts
    spread = list(prompts[:: max(1, len(prompts) // few)])[:few]
    name = f"{run.config.name}/{base}"
    assert policy.weights is not None, "a policy without weights is refused before the run begins"
    return TrainJob(run.config, run.constitution, name, policy.weights, folder, rows, spread, keep, processes_of(run.config))


class _Shown:
    """A `Watch` that shows progress and notes the seconds at every checkpoint."""

    def __init__(self, run: Context, name: str, note: Callable[[], None]) -> None:
        self._ui, self._name, self.saved = run.ui, name, note
        self._open = contextlib.ExitStack()
        self._tick: Tick = lambda _: None

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, *how: Any) -> None:
        self._open.__exit__(*how)

    def begins(self, steps: int) -> None:
        self._tick = self._open.enter_context(self._ui.stage(self._name, steps, "steps"))

    def step(self) -> None:
        self._tick(1)


def _finish(job: TrainJob, trained: dict[str, Any]) -> dict[str, Any]:
    """Hand the model over, and write log.json; what of it goes into the manifest."""
    best = last_checkpoint(job.folder / "checkpoints")
    if best is None:
        raise NothingToTrainOn(
            f"training collapsed before its first checkpoint ({trained['collapsed']}); no model is handed over",
            hint="lower train.learning_rate, or set train.guard.every_steps lower to keep an earlier checkpoint",
        )
    hand_over(best, job.folder, job.model, trust_remote_code=job.config.engine.trust_remote_code)
    history = trained["history"]
    result = {
        "model": str(job.folder / "model"),
        "steps": trained["steps"],
        "steps_kept": step_of(best),
        "collapsed": trained["collapsed"],
        "prompts": trained["prompts"],
        "loss": [history[0]["loss"], history[-1]["loss"]] if history else [],
        "accuracy": [history[0]["pairs/accuracy"], history[-1]["pairs/accuracy"]] if history else [],
    }
    guard = {"before": trained["before"], "probes": trained["probes"]}
    write_json(job.folder / "log.json", {"result": result, "steps": history, "guard": guard})
    return result
