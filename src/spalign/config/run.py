"""A whole run: all stages' options under a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from spalign.config.base import Part, PositiveInt
from spalign.config.engine import EngineConfig
from spalign.config.parts import (
    OUTLETS,
    DenoiseConfig,
    EvaluationConfig,
    PairsConfig,
    PromptsConfig,
    RefineConfig,
    SampleConfig,
    SelfEvaluationConfig,
    TrainConfig,
)
from spalign.constitution import Constitution, load_constitution
from spalign.errors import ConfigError

RECIPES: dict[str, dict[str, Any]] = {
    "robust": {},
    "paper": {
        "self_evaluation": {"scorer": "likert", "thresholds": {}, "use_constitution_thresholds": False},
        "refine": {"style": "paper", "drafts": 1},
        "denoise": {"consistency": "strict", "tau": "32%"},
        "pairs": {"delta": 1.0, "max_per_prompt": None, "balance_length": False},
    },
}


class RunConfig(Part):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str = "demo"
    """Hub id, local folder, GGUF file, or `demo` (SmolLM2-135M-Instruct from its package)."""
    constitution: str = "harmless_helpful"
    """A shipped constitution or a YAML file."""
    recipe: Literal["robust", "paper"] = "robust"
    compare: tuple[Literal["robust", "paper"], ...] = ()
    """Recipes whose yield on the same candidates is measured and printed beside this one's; not trained on."""
    runs_dir: str = "runs"
    data_from: str | None = None
    """Another run's folder: what it has finished of the same inputs is linked from there, so that baselines train on the same data."""
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: PositiveInt = 1
    new_prompts: bool = False
    """Give every iteration its own share of the training prompts instead of the same ones."""
    shard_size: PositiveInt = 32
    """Prompts a part file. A kill loses the completions in flight, and of scores at most those of one part."""
    prompts: PromptsConfig = PromptsConfig()
    engine: EngineConfig = EngineConfig()
    sample: SampleConfig = SampleConfig()
    self_evaluation: SelfEvaluationConfig = SelfEvaluationConfig()
    refine: RefineConfig = RefineConfig()
    denoise: DenoiseConfig = DenoiseConfig()
    pairs: PairsConfig = PairsConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    def on_record(self) -> dict[str, Any]:
        """The configuration without what changes nothing that is made: leave to go on with a weak judge, trackers, the hub."""
        record = self.model_dump(mode="json", exclude={"self_evaluation": {"allow_weak_judge"}, "train": OUTLETS, "data_from": True})
        return {**record, "denoise": self.denoise.matters(), "pairs": self.pairs.matters()}

    @property
    def judge_engine(self) -> EngineConfig:
        """How a judge of its own is run; the policy's tokenizer is not the judge's."""
        return self.self_evaluation.judge_engine or self.engine.model_copy(update={"tokenizer": None})

    def with_recipe(self, recipe: str) -> RunConfig:
        """This run under another recipe: only the options in which recipes differ change."""
        data = self.model_dump()
        fresh = RunConfig(name=self.name).model_dump()
        for options in RECIPES.values():
            for part, keys in options.items():
                data[part].update({k: fresh[part][k] for k in keys})
        return RunConfig.model_validate(merge(data, {**RECIPES[recipe], "recipe": recipe, "compare": ()}))

    def constitution_for_run(self) -> Constitution:
        """The constitution with this run's thresholds; raises ConfigError where the run names an objective it lacks."""
        constitution = load_constitution(self.constitution)
        own = self.self_evaluation
        named = {**own.thresholds, **(own.scorer if isinstance(own.scorer, dict) else {})}
        if unknown := sorted(set(named) - set(constitution.objective_names)):
            raise ConfigError(
                f"self_evaluation names the unknown objective '{unknown[0]}'",
                hint=f"constitution '{constitution.name}' has: {', '.join(constitution.objective_names)}",
            )
        if isinstance(own.scorer, dict) and (missing := set(constitution.objective_names) - set(own.scorer)):
            raise ConfigError(
                f"self_evaluation.scorer says nothing about objective '{min(missing)}'",
                hint="name a scorer for every objective, or one for all",
            )
        if self.pairs.weights is not None and len(self.pairs.weights) != len(constitution.objectives):
            raise ConfigError(
                f"pairs.weights has {len(self.pairs.weights)} weights, and constitution '{constitution.name}' "
                f"{len(constitution.objectives)} objectives",
                hint=f"give one each, in this order: {', '.join(constitution.objective_names)}",
            )
        objectives = tuple(
            o.model_copy(update={"threshold": own.thresholds.get(o.name, o.threshold if own.use_constitution_thresholds else None)})
            for o in constitution.objectives
        )
        for o in objectives:
            if own.scorer_of(o.name) == "yes_no" and not o.exemplars:
                raise ConfigError(
                    f"constitution '{constitution.name}': objective '{o.name}' has no exemplars, which the yes_no scorer needs",
                    hint="add at least one 'yes' and one 'no' exemplar, or set self_evaluation.scorer to auto",
                )
            if own.scorer_of(o.name) == "pairwise" and o.threshold is not None:
                raise ConfigError(
                    f"objective '{o.name}' has a threshold, and its scorer 'pairwise' only compares a prompt's answers with each other",
                    hint="use another scorer, or leave out the threshold",
                )
        return constitution.model_copy(update={"objectives": objectives})


def what_counts(record: Any) -> Any:
    """Of a configuration on record, of whatever version, what makes it another one: not where the run is, nor how engines are run alike."""
    if not isinstance(record, Mapping):
        return record
    own = record.get("self_evaluation")
    engines = {"engine": _engine_counts(record.get("engine"))}
    if isinstance(own, Mapping):
        engines["self_evaluation"] = {**own, "judge_engine": _engine_counts(own.get("judge_engine"))}
    return {k: v for k, v in {**record, **engines}.items() if k != "runs_dir"}


def _engine_counts(record: Any) -> Any:
    try:
        engine = EngineConfig.model_validate(record)
    except ValidationError:  # None, or of a version that had other options
        return record
    return {**engine.matters(), "hidden_states": engine.hidden_states, "tokenizer": engine.tokenizer}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = merge(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) and inner else value
    return out
