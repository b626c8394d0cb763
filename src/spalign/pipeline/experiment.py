"""`spalign experiment`: every cell of a table is runs on disk, so what was interrupted goes on, and tables share what they have in common.

A cell is a policy, a data set and a seed. Its arms train on the data of one of them (`spa`) as far as it is made alike for them; then they
all answer the same prompts, and one judge reads them all.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from spalign.config import DATA_ARM, AssessConfig, ExperimentConfig, RunConfig
from spalign.errors import ConfigError, NothingToTrainOn
from spalign.pipeline.assess import Judged, figures, judged
from spalign.pipeline.context import EngineFactory
from spalign.pipeline.run import run
from spalign.report import Progress
from spalign.report.experiment import experiment_table
from spalign.store import read_json, write_atomic, write_json
from spalign.training.soup import soup

UTILITY = "utility"


def experiment(
    config: ExperimentConfig, name: str, *, ui: Progress | None = None, make_engine: EngineFactory | None = None
) -> dict[str, Any]:
    """All cells, then the table; NAME.json and NAME.md in `config.runs_dir`. Raises SpalignError with the fix; what is finished is kept.

    make_engine: for engines of your own, which answer and score in place of the models.
    """
    ui = ui or Progress(quiet=True)
    folder = Path(config.runs_dir)
    cells = (_agreement if config.measure == "rv" else _judged)(config, ui, make_engine)
    found = {"name": name, "title": config.title, "config": config.model_dump(mode="json"), **cells}
    write_json(folder / f"{name}.json", found)
    write_atomic(folder / f"{name}.md", experiment_table(found).encode())
    return found


def _judged(config: ExperimentConfig, ui: Progress, make: EngineFactory | None) -> dict[str, Any]:
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for policy, data in product(config.policies, config.data):
        by_set: dict[str, list[Judged]] = {}
        for seed in config.seeds:
            models, without = _models(config, policy, data, seed, ui, make)
            failed |= {f"{policy}, {data}, seed {seed}, {arm}": why for arm, why in without.items()}
            for assessment in _assessments(config, policy, data, seed, models):
                ui.line(f"{policy}, {data}, seed {seed}: {assessment.name}", style="bold")
                by_set.setdefault(assessment.name, []).append(judged(assessment, ui=ui, make_engine=make))
        for where, seeds in by_set.items():
            common = [label for label in seeds[0].config.models if all(label in s.config.models for s in seeds)]
            results.setdefault(policy, {}).setdefault(data, {})[where] = {
                **figures([_only(s, common) for s in seeds]),
                "by_seed": [_means(figures([_only(s, common)])) for s in seeds],
            }
    return {"results": results, "failed": failed}


def _only(found: Judged, labels: Sequence[str]) -> Judged:
    """Without the arms that another seed has no model of."""

    def some(by: Mapping[str, Any]) -> dict[str, Any]:
        return {label: value for label, value in by.items() if label in labels}

    config = found.config.model_copy(update={"models": some(found.config.models)})
    parts: dict[str, Any] = {name: some(getattr(found, name)) for name in ("groups", "verdicts", "mmlu", "mt_bench")}
    return dataclasses.replace(found, config=config, **parts)


def _means(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """label -> measure -> mean over all prompts."""
    return {
        label: {m: slices["all"]["mean"]["mean"] for m, slices in by.items() if "all" in slices} for label, by in found["scores"].items()
    }


def cell_folder(config: ExperimentConfig, policy: str, data: str, seed: int) -> Path:
    return Path(config.runs_dir) / f"{policy}.{data}.seed{seed}"


def trained_arms(config: ExperimentConfig) -> list[str]:
    """Arms that are trained, those that soups are made of among them; the one whose data all use first."""
    wanted = [a for arm in config.arms for a in (config.own_arms[arm].soup or (arm,)) if config.own_arms[a].set is not None]
    return sorted(dict.fromkeys(wanted), key=lambda a: a != DATA_ARM)


def _models(
    config: ExperimentConfig, policy: str, data: str, seed: int, ui: Progress, make: EngineFactory | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Arm -> model, for one cell; and why others have none."""
    folder = cell_folder(config, policy, data, seed)
    trained, failed = dict[str, str](), dict[str, str]()
    arms = trained_arms(config)
    if arms and DATA_ARM not in arms:  # its data are used all the same
        data_run = config.run_of(policy, data, seed, DATA_ARM, folder)
        run(data_run, mode="resume" if data_run.folder.exists() else "auto", until="pair", ui=ui, make_engine=make)
    for arm in arms:
        own = config.run_of(policy, data, seed, arm, folder)
        ui.line(f"{policy}, {data}, seed {seed}: {arm}", style="bold")
        try:
            run(own, mode="resume" if own.folder.exists() else "auto", until="train", ui=ui, make_engine=make)
            trained[arm] = str(_trained_model(own))
        except NothingToTrainOn as e:
            failed[arm] = e.message
            ui.line(f"{arm}: {e.message}", style="yellow")
    models = {}
    for arm in config.arms:
        own_arm = config.own_arms[arm]
        if own_arm.soup:
            if parts := [trained[a] for a in own_arm.soup if a in trained]:
                if len(parts) == 2:
                    models[arm] = str(_soup(folder, arm, own_arm.soup, parts))
                else:
                    failed[arm] = "one of its two models is missing"
            continue
        if own_arm.set is None:
            models[arm] = config.policies[policy].model
        elif arm in trained:
            models[arm] = trained[arm]
    return models, failed


def _trained_model(config: RunConfig) -> Path:
    return config.folder / f"iteration-{config.iterations}" / "6-train" / "model"


def _soup(folder: Path, arm: str, weights: Mapping[str, float], parts: Sequence[str]) -> Path:
    """The mixed model, made anew where one of its parts was."""
    out = folder / arm.replace(":", "-")
    made_of = {"of": [(read_json(Path(p).parent / "manifest.json") or {}).get("digest") for p in parts], "weights": dict(weights)}
    if read_json(out / "soup.json") != made_of:
        shutil.rmtree(out, ignore_errors=True)
        first, second = weights.values()
        soup(Path(parts[0]), Path(parts[1]), out, weight=first / (first + second))
        write_json(out / "soup.json", made_of)
    return out


def _assessments(config: ExperimentConfig, policy: str, data: str, seed: int, models: Mapping[str, str]) -> list[AssessConfig]:
    """One a set of prompts; one more for utility alone."""
    base = config.run_of(policy, data, seed, DATA_ARM, cell_folder(config, policy, data, seed))
    common = {
        "models": dict(models),
        "judge": config.judge,
        "constitution": base.constitution,
        "suffix": base.prompts.suffix,
        "engine": base.engine.here(),
        "answer": config.answer,
        "lambdas": config.lambdas,
        "bootstrap": config.bootstrap,
        "seed": seed,
        "runs_dir": str(cell_folder(config, policy, data, seed)),
    }
    sets = [
        AssessConfig.model_validate(
            {**common, "name": f"on-{where}", "prompts": source, "trained_on": (base.prompts.train,), "pairwise": config.pairwise}
        )
        for where, source in config.data[data].evaluate.items()
    ]
    if config.mmlu or config.mt_bench:
        own = {"name": f"on-{UTILITY}", "prompts": None, "suffix": "", "mmlu": config.mmlu, "mt_bench": config.mt_bench}
        sets.append(AssessConfig.model_validate({**common, **own}))
    return sets


def _agreement(config: ExperimentConfig, ui: Progress, make: EngineFactory | None) -> dict[str, Any]:
    """The RV coefficient of self-scores and a reference judge's as unstable prompts are added, for each cell."""
    found: dict[str, Any] = {}
    for policy, data, seed in product(config.policies, config.data, config.seeds):
        own = config.run_of(policy, data, seed, DATA_ARM, cell_folder(config, policy, data, seed))
        if own.self_evaluation.reference_judge is None:
            raise ConfigError("an rv experiment compares with a second judge", hint="set run.self_evaluation.reference_judge")
        done = run(own, mode="resume" if own.folder.exists() else "auto", ui=ui, make_engine=make)
        assert done.summary is not None
        found[f"{policy}, {data}, seed {seed}"] = done.summary["agreement"]
    return {"agreement": found}


def cost(config: ExperimentConfig) -> dict[str, Any]:
    """What the experiment will take at most: before anything runs, and without a model."""
    from spalign import prompts as prompt_sets

    total = dict.fromkeys(("trainings", "generated_tokens", "self_scores", "answers", "judge_questions"), 0)
    for policy, data, seed in product(config.policies, config.data, config.seeds):
        folder = cell_folder(config, policy, data, seed)
        for arm in trained_arms(config):
            own = config.run_of(policy, data, seed, arm, folder)
            base = config.run_of(policy, data, seed, DATA_ARM, folder)
            n = _count(own, prompt_sets)
            total["trainings"] += own.iterations
            per_prompt = own.sample.n + own.refine.drafts * (2 if own.refine.placebo else 1)
            alike = arm != DATA_ARM and (own.sample, own.prompts, own.refine, own.iterations) == (
                base.sample,
                base.prompts,
                base.refine,
                base.iterations,
            )
            rounds = own.iterations if not alike else 0
            total["generated_tokens"] += rounds * n * per_prompt * own.sample.max_new_tokens
            total["self_scores"] += rounds * n * per_prompt * 2
        for source in config.data[data].evaluate.values():
            answers = len(config.arms) * (source.limit or _size(source, prompt_sets)) * config.answer.samples
            total["answers"] += answers
            total["generated_tokens"] += answers * config.answer.max_new_tokens
            total["judge_questions"] += answers * 2 + (4 * answers if config.pairwise else 0)
    return total


def _count(own: RunConfig, prompt_sets: Any) -> int:
    return own.prompts.train.limit or _size(own.prompts.train, prompt_sets)


def _size(source: Any, prompt_sets: Any) -> int:
    from spalign.config import PromptsConfig

    return len(prompt_sets.load_prompts(source, PromptsConfig()))
