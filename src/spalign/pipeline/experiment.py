"""`spalign experiment`: every cell of a table is runs on disk, so what was interrupted goes on, and tables share what they have in common.

A cell is a policy, a data set and a seed. Its arms train on the data of one of them (`spa`) as far as it is made alike for them; then they
all answer the same prompts, and one judge reads them all.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from spalign.config import DATA_ARM, AssessConfig, ExperimentConfig, MMLUConfig, RunConfig
from spalign.errors import ConfigError, NothingToTrainOn, SpalignError
from spalign.evaluation.mmlu import load_mmlu
from spalign.pipeline.assess import check, judged
from spalign.pipeline.budget import prompts_in, responses_a_prompt, sampled_prompts
from spalign.pipeline.context import EngineFactory
from spalign.pipeline.figures import Judged, figures
from spalign.pipeline.run import agree, run
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
    if config.measure == "judge":
        for policy, data in product(config.policies, config.data):
            _checked(config, policy, data)
    cells = (_agreement if config.measure == "rv" else _judged)(config, ui, make_engine)
    found = {"name": name, "title": config.title, "config": config.model_dump(mode="json"), **cells}
    write_json(folder / f"{name}.json", found)
    write_atomic(folder / f"{name}.md", experiment_table(found).encode())
    return found


def _checked(config: ExperimentConfig, policy: str, data: str) -> None:
    """Before anything is trained: the runs and evaluations of a cell are what they should be, and its judge answers."""
    seed = config.seeds[0]
    for arm in trained_arms(config):
        config.run_of(policy, data, seed, arm, cell_folder(config, policy, data, seed)).constitution_for_run()
    for assessment in _assessments(config, policy, data, seed, dict.fromkeys(config.arms, config.policies[policy].model)):
        check(assessment)


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
            results.setdefault(policy, {}).setdefault(data, {})[where] = _over_seeds(seeds, config.arms)
    return {"results": results, "failed": failed}


def _over_seeds(seeds: Sequence[Judged], arms: Sequence[str]) -> dict[str, Any]:
    """Every arm over the seeds in which it has a model, held against the first arm's in the same seeds."""
    first = arms[0]
    seeds = [s for s in seeds if first in s.config.models]
    if not seeds:
        raise NothingToTrainOn(
            f"'{first}', which the others are compared with, has no model in any seed",
            hint="put an arm first that has one, for example vanilla; what is finished is kept",
        )
    out = figures([_only(s, [first]) for s in seeds])
    out["seeds_of"] = {first: len(seeds)}
    for arm in arms[1:]:
        if mine := [_only(s, [first, arm]) for s in seeds if arm in s.config.models]:
            found = figures(mine)
            for part in ("models", "scores", "unscored", "pairwise", "utility"):
                if arm in found[part]:
                    out[part][arm] = found[part][arm]
            out["seeds_of"][arm] = len(mine)
    return {**out, "by_seed": [_means(figures([s])) for s in seeds]}


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
    runs = [config.run_of(policy, data, seed, arm, cell_folder(config, policy, data, seed)) for arm in trained_arms(config)]
    trained = tuple({repr(r.prompts.train): r.prompts.train for r in runs}.values())
    sets = [
        AssessConfig.model_validate(
            {**common, "name": f"on-{where}", "prompts": source, "trained_on": trained, "pairwise": config.pairwise}
        )
        for where, source in config.data[data].evaluate.items()
    ]
    if config.mmlu or config.mt_bench:
        own = {"name": f"on-{UTILITY}", "prompts": None, "suffix": "", "mmlu": config.mmlu, "mt_bench": config.mt_bench}
        sets.append(AssessConfig.model_validate({**common, **own}))
    return sets


def _agreement(config: ExperimentConfig, ui: Progress, make: EngineFactory | None) -> dict[str, Any]:
    """The RV coefficient of self-scores and a reference judge's as unstable prompts are added, for each cell; nothing is trained."""
    found: dict[str, Any] = {}
    for policy, data, seed in product(config.policies, config.data, config.seeds):
        own = config.run_of(policy, data, seed, DATA_ARM, cell_folder(config, policy, data, seed))
        if own.self_evaluation.reference_judge is None:
            raise ConfigError("an rv experiment compares with a second judge", hint="set run.self_evaluation.reference_judge")
        told = agree(own, mode="resume" if own.folder.exists() else "auto", ui=ui, make_engine=make)
        found[f"{policy}, {data}, seed {seed}"] = told
    return {"agreement": found}


def cost(config: ExperimentConfig) -> dict[str, Any]:
    """What the experiment will take at most: before anything runs, and without a model. Sources that cannot be read count as nothing."""
    names = ("trainings", "generated_tokens", "self_scores", "answers", "mmlu_questions", "judge_questions")
    total = dict.fromkeys(names, 0)
    checked = AssessConfig.model_fields["check"].default
    for policy, data, seed in product(config.policies, config.data, config.seeds):
        folder = cell_folder(config, policy, data, seed)
        base = config.run_of(policy, data, seed, DATA_ARM, folder)
        arms = trained_arms(config)
        objectives = len(base.constitution_for_run().objectives)
        for arm in dict.fromkeys([DATA_ARM, *arms]):
            own = config.run_of(policy, data, seed, arm, folder)
            trained = config.measure == "judge"
            total["trainings"] += own.iterations if arm in arms and trained else 0
            per_prompt = responses_a_prompt(own) if trained else own.sample.n
            alike = arm != DATA_ARM and all(getattr(own, p) == getattr(base, p) for p in ("sample", "prompts", "refine", "new_prompts"))
            each = prompts_in(own.prompts.train, own.prompts)
            prompts = sampled_prompts(own, each)
            if alike:  # the first iteration is made once for all that make it alike
                prompts -= math.ceil(each / own.iterations) if own.new_prompts else each
            total["generated_tokens"] += prompts * per_prompt * own.sample.max_new_tokens
            total["self_scores"] += prompts * per_prompt * objectives
        for source in config.data[data].evaluate.values() if config.measure == "judge" else ():
            answers = len(config.arms) * prompts_in(source, base.prompts) * config.answer.samples
            total["answers"] += answers
            total["generated_tokens"] += answers * config.answer.max_new_tokens
            compared = 2 * objectives * (len(config.arms) - 1) * prompts_in(source, base.prompts) if config.pairwise else 0
            total["judge_questions"] += answers * objectives + compared + checked * objectives
        if config.mt_bench:
            answers = 2 * len(config.arms) * min(80, config.mt_bench.limit or 80)
            total["answers"] += answers
            total["generated_tokens"] += answers * config.answer.max_new_tokens
            total["judge_questions"] += answers + checked * objectives
        if config.mmlu:
            total["mmlu_questions"] += len(config.arms) * _mmlu_questions(config.mmlu)
    return total


def _mmlu_questions(config: MMLUConfig) -> int:
    if config.file is None:
        return 57 * config.limit if config.limit else 14_042  # a limit is for each subject
    try:
        return len(load_mmlu(config))
    except SpalignError:
        return 0
