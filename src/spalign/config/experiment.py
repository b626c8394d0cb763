"""An experiment: policies x data x arms x seeds, and the table that comes out. Its files are in configs/paper."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from spalign.config.assess import AnswerConfig, JudgeConfig, Label, MMLUConfig, MTBenchConfig
from spalign.config.base import Part
from spalign.config.load import config_from, with_sets
from spalign.config.parts import PromptSource
from spalign.config.run import RunConfig, merge
from spalign.errors import ConfigError
from spalign.yamlfile import Location, build, load_yaml

DATA_ARM = "spa"
"""The arm whose data all arms train on, as far as they are made alike."""


class Arm(Part):
    """A row of the table: a training, a mix of two others' weights, or the policy as it is (neither)."""

    set: dict[str, Any] | None = None
    """Options laid over the experiment's run; {} is SPA itself."""
    soup: Annotated[dict[Label, Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    """{arm: weight} of two trained arms."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.set is not None and self.soup is not None:
            raise ValueError("an arm is trained (set) or mixed (soup), not both")
        if self.soup is not None and sum(self.soup.values()) <= 0:
            raise ValueError("soup: one of the weights must be above 0")
        return self


class PolicyPart(Part):
    """A model that is aligned."""

    model: str
    set: dict[str, Any] = {}


class DataPart(Part):
    """What is trained on, and on what its models are evaluated."""

    set: dict[str, Any] = {}
    evaluate: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], PromptSource] = {}
    """{name: prompts}; none: only utility."""


class ExperimentConfig(Part):
    """A table of the paper, or one like it."""

    title: str
    policies: Annotated[dict[Label, PolicyPart], Field(min_length=1)]
    data: Annotated[dict[Label, DataPart], Field(min_length=1)]
    arms: Annotated[tuple[Label, ...], Field(min_length=1)]
    """Rows, in order; the first is what the others are compared with. Each is defined in arms.yaml or in `own_arms`."""
    own_arms: dict[Label, Arm] = {}
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    run: dict[str, Any] = {}
    """Options of every run."""
    measure: Literal["judge", "rv"] = "judge"
    """judge: the arms' answers are judged. rv: self-scores are held against those of run.self_evaluation.reference_judge."""
    judge: JudgeConfig | None = None
    answer: AnswerConfig = AnswerConfig()
    columns: tuple[str, ...] = ("primary", "secondary")
    """Of each evaluated set: primary, secondary, HH_5 (any lambda), win_primary, win_secondary; of each policy: mmlu, mt_bench."""
    lambdas: tuple[Annotated[float, Field(ge=0)], ...] = (5, 10, 20)
    mmlu: MMLUConfig | None = None
    mt_bench: MTBenchConfig | None = None
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    paper: dict[str, dict[str, dict[str, tuple[float | None, ...]]]] = {}
    """{policy: {arm: {evaluated set, or utility: the paper's figures in the order of its columns}}}."""
    runs_dir: str = "runs"

    @property
    def pairwise(self) -> bool:
        return any(c.startswith("win_") for c in self.columns)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        known = ("primary", "secondary", "win_primary", "win_secondary", "mmlu", "mt_bench", *(f"HH_{w:g}" for w in self.lambdas))
        if odd := [c for c in self.columns if c not in known]:
            raise ValueError(f"columns: '{odd[0]}' is none; there are: {', '.join(known)}")
        if unknown := [a for a in self.arms if a not in self.own_arms]:
            raise ValueError(f"no arm '{unknown[0]}'; there are: {', '.join(self.own_arms)}")
        parts = {a for arm in self.arms for a in self.own_arms[arm].soup or ()}
        if untrained := [a for a in parts if a not in self.own_arms or self.own_arms[a].set is None]:
            raise ValueError(f"a soup is made of trained arms, and '{untrained[0]}' is none")
        if DATA_ARM not in self.own_arms:
            raise ValueError(f"no arm '{DATA_ARM}', whose data the others train on")
        if self.measure == "judge" and self.judge is None:
            raise ValueError("judge: who judges? for example {model: openai/gpt-4o}")
        return self

    def run_of(self, policy: str, data: str, seed: int, arm: str, folder: Path) -> RunConfig:
        """The run of a trained arm. Raises ConfigError where its options are none."""
        own = self.policies[policy]
        name = f"experiment: {policy}, {data}, {arm}"
        fixed = {
            "name": arm.replace(":", "-"),
            "runs_dir": str(folder),
            "seed": seed,
            "model": own.model,
            "evaluation": {"gate": {"enabled": False}},
            **({"data_from": str(folder / DATA_ARM)} if arm != DATA_ARM else {}),
        }
        options: Mapping[str, Any] = {}
        for part in (self.run, own.set, self.data[data].set, self.own_arms[arm].set or {}, fixed):
            options = merge(options, part)
        return config_from(options, source=name)


def experiments_folder() -> Path:
    """configs/paper of the repository, or its copy in the package."""
    packaged = Path(str(files("spalign"))) / "experiments"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "configs" / "paper"


def experiment_names() -> list[str]:
    return sorted(p.stem for p in experiments_folder().glob("*.yaml") if p.stem != "arms")


def load_experiment(name: str, scale: str = "full", sets: tuple[str, ...] = ()) -> ExperimentConfig:
    """The experiment of that name, or in that file, at a scale. Raises ConfigError with every mistake at once.

    A file holds the full experiment, or what it has others than the one that it `extends`; `scales` holds what other scales lay over it.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else experiments_folder() / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no experiment '{name}'", hint=f"one of: {', '.join(experiment_names())}; or a .yaml file of your own")
    data, lines = _extended(path)
    scales = data.pop("scales", None) or {}
    if scale != "full":
        if not isinstance(scales, Mapping) or not isinstance(scales.get(scale), Mapping):
            raise ConfigError(f"{path}: no scale '{scale}'", hint=f"one of: {', '.join(['full', *scales])}")
        data, lines = _laid_over(data, scales[scale]), {}
    arms, _ = load_yaml(experiments_folder() / "arms.yaml", ConfigError)
    data = merge({"own_arms": arms}, data)
    merged, places = with_sets(data, sets, lines)
    return build(ExperimentConfig, merged, source=str(path), lines=places, error=ConfigError)


_WHOLE = ("policies", "data", "paper")
"""Mappings of which another scale or table has others, not more."""


def _extended(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """The file's mapping laid over that of the file it extends; with that, lines are not known."""
    data, lines = load_yaml(path, ConfigError)
    if (base := data.pop("extends", None)) is None:
        return data, lines
    if not isinstance(base, str) or not (path.parent / base).is_file() or (path.parent / base).samefile(path):
        raise ConfigError(f"{path}: extends '{base}', which is no other file beside it", hint="name one, for example table1.yaml")
    theirs, _ = _extended(path.parent / base)
    mine, scales = data.pop("scales", None) or {}, theirs.pop("scales", None) or {}
    laid = {name: _laid_over(scales.get(name) or {}, mine.get(name) or {}) for name in {**scales, **mine}}
    return {**_laid_over(theirs, data), "scales": laid}, {}


def _laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**merge(base, over), **{key: over[key] for key in _WHOLE if key in over}}
