"""Before a model is loaded: everything that a configuration and its prompts can be refused for, and the context of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import PromptSource, RunConfig
from spalign.constitution import Constitution
from spalign.engines.base import Engine
from spalign.engines.make import load_engine, weights_of
from spalign.errors import ConfigError, EngineError
from spalign.pipeline.context import Context, EngineFactory
from spalign.pipeline.launch_file import check_launch
from spalign.pipeline.publish import check_outlets
from spalign.report import Progress
from spalign.store import RunFolder
from spalign.types import Prompt


def checks_of(config: RunConfig) -> list[Callable[[], Any]]:
    """What the configuration alone can be refused for; each raises SpalignError by itself."""
    recipes = [config, *(config.with_recipe(recipe) for recipe in config.compare)]
    return [
        partial(check_outlets, config),
        partial(check_launch, config),
        partial(_check_four_bits, config),
        *(recipe.constitution_for_run for recipe in recipes),
        partial(_check_judges, config),
        partial(_check_data_from, config),
        partial(_check_policy, config),
    ]


def _check_judges(config: RunConfig) -> None:
    own = config.self_evaluation
    if own.reference_judge is None and own.reference_scorer is not None:
        raise ConfigError(
            "self_evaluation.reference_scorer is for a reference judge, and there is none", hint="name it: self_evaluation.reference_judge"
        )
    if own.reference_judge is not None:
        config.model_copy(update={"self_evaluation": own.of_reference()}).constitution_for_run()
    others = {own.judge, own.reference_judge} - {None, config.model}
    if others and config.engine.kind == config.judge_engine.kind == "ray" and not (config.engine.workers and config.judge_engine.workers):
        raise ConfigError(
            "engine.kind is ray, and a judge of its own needs workers beside the policy's, which takes all that there is room for",
            hint="say how many each has, so that both find room: engine.workers, and self_evaluation.judge_engine for the judge's",
        )


def _check_four_bits(config: RunConfig) -> None:
    if config.train.lora and config.train.lora.base_dtype == "nf4":
        from spalign.engines.loading import need_bitsandbytes

        need_bitsandbytes()


def _check_data_from(config: RunConfig) -> None:
    if config.data_from and not (Path(config.data_from) / "config.yaml").is_file():
        raise ConfigError(f"data_from: {config.data_from} is no run", hint="name the folder of a run, or leave it out")


def _check_policy(config: RunConfig) -> None:
    if weights_of(config.model, config.engine) is None:
        raise EngineError(
            f"the policy '{config.model}' is only served, and a run trains its policy: that needs its weights here",
            hint="name its hub id or folder: engine.tokenizer; a model that is only served can judge (self_evaluation.judge, judge_engine)",
        )


def prompts_of(config: RunConfig, source: PromptSource, ui: Progress) -> list[Prompt]:
    """The prompts of one of the run's sets; what was left out of them is said. Raises PromptError."""
    return prompt_sets.load_prompts(source, config.prompts, note=lambda text: ui.line(f"note: {text}", style="yellow"))


def note_candidates(config: RunConfig, constitution: Constitution, ui: Progress) -> None:
    """Say where there are too few candidates for a covariance."""
    n, k = config.sample.n, len(constitution.objectives)
    if n <= k:
        ui.line(f"note: {n} candidates on {k} objectives always have det(Sigma) = 0; raise sample.n", style="yellow")


def check_prompts(config: RunConfig, train: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    """Raises SpalignError where the sets overlap, or `new_prompts` has fewer of them than iterations."""
    prompt_sets.check_disjoint(train, heldout)
    if config.new_prompts and config.iterations > len(train):
        raise ConfigError(
            f"new_prompts: {config.iterations} iterations need at least {config.iterations} training prompts, there are {len(train)}",
            hint="lower iterations",
        )


def prepare(config: RunConfig, ui: Progress, make_engine: EngineFactory | None) -> Context:
    """Everything that can be checked before a model is loaded."""
    for check in checks_of(config):
        check()
    constitution = config.constitution_for_run()
    train, heldout = (prompts_of(config, source, ui) for source in (config.prompts.train, config.prompts.heldout))
    check_prompts(config, train, heldout)
    note_candidates(config, constitution, ui)

    def own(name: str) -> Engine:
        return load_engine(name, config.engine if name == config.model else config.engine.here())  # what the run made, no server has

    def judge(name: str) -> Engine:
        return load_engine(name, config.judge_engine)

    makers = (make_engine or own, make_engine or judge)
    return Context(config, constitution, RunFolder(config.folder), ui, train, heldout, *makers, shares_checks=make_engine is None)
