"""What a run would have kept under other options: from its stored scores, without a model, in seconds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spalign.config import DenoiseConfig, PairsConfig, RunConfig, config_from
from spalign.config.run import merge
from spalign.constitution import Constitution, Objective
from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.look import finished, iterations
from spalign.pipeline.pair_table import PAIR, MadePairs, PairMaker, selected
from spalign.pipeline.parts import best_scored, group_of, over_parts, read_groups
from spalign.pipeline.run import run as run_pipeline
from spalign.preference import check, resolve_tau, unstable
from spalign.report import Progress
from spalign.rollout import Drafts, choose
from spalign.store import Part, Stage
from spalign.types import DropReason
from spalign.yamlfile import build, load_yaml

FREE = ("denoise", "pairs", "train.alpha", "self_evaluation.thresholds", "self_evaluation.use_constitution_thresholds")
"""Options that what-if can change: nothing that is generated or scored depends on them."""


@dataclass(frozen=True)
class Stored:
    """An iteration's scores on disk, and what was made of them."""

    folder: Path
    config: RunConfig
    objectives: tuple[Objective, ...]
    """In order of priority, with a number for every threshold."""
    scored: Stage
    refined: Stage


@dataclass(frozen=True)
class Choice:
    """Options to try. order: names of the objectives, the first the most important; resolutions: {objective: bin width or None}."""

    sets: tuple[str, ...] = ()
    thresholds: Mapping[str, float | None] | None = None
    resolutions: Mapping[str, float | None] | None = None
    order: tuple[str, ...] | None = None


def stored(folder: Path, iteration: int = 1) -> Stored:
    """The run's. Raises RunFolderError where there is no such run, or its candidates are not scored yet."""
    iterations(folder)
    base = folder / f"iteration-{iteration}"
    data, _ = load_yaml(folder / "config.yaml", ConfigError)
    config = build(RunConfig, data, source=str(folder / "config.yaml"), lines={}, error=ConfigError)
    told, _ = load_yaml(folder / "constitution.yaml", ConfigError)
    constitution = build(Constitution, told, source=str(folder / "constitution.yaml"), lines={}, error=ConfigError)
    scored, refined, denoised = (_finished(base / name) for name in ("2-evaluate", "3-refine", "4-denoise"))
    levels = {name: threshold for name, threshold, _ in denoised.inputs["levels"]}
    found = {row["objective"]: row["judgement"] for row in _finished(base / "0-judge").rows()} if "auto" in levels.values() else {}
    objectives = tuple(
        o.model_copy(update={"threshold": found[o.name]["threshold"] if levels[o.name] == "auto" else levels[o.name]})
        for o in constitution.objectives
    )
    return Stored(folder, config, objectives, scored, refined)


def _finished(folder: Path) -> Stage:
    stage = finished(folder)
    if stage is None:
        raise RunFolderError(f"{folder}: not finished", hint="finish the run, or its stages up to 4-denoise, first")
    return stage


def what_if(run: Stored, choice: Choice) -> dict[str, Any]:
    """The funnel, pairs and weights under `choice`. Raises ConfigError for an option that more than the choice of data depends on."""
    config, objectives = _under(run, choice)
    parts = list(zip(run.scored.finished_parts(), run.refined.finished_parts(), strict=True))
    judged = list(over_parts(partial(_part, objectives, config.denoise, config.pairs), parts, run.scored))
    dets = [det for part in judged for det in part.dets]
    tau = resolve_tau(dets, config.denoise) if dets and config.denoise.enabled else None
    dropped = sum((part.dropped for part in judged), Counter[str]())
    made, kept = [], 0
    for part in judged:
        stays = np.array([unstable(det, tau) is None for det in part.dets], dtype=np.bool_)
        dropped[str(DropReason.UNSTABLE)] += int((~stays).sum())
        made.append(part.made.only(np.array([i < 0 or bool(stays[i]) for i in part.kept_index], dtype=np.bool_)))
        kept += int(stays.sum()) + part.without_det
    chosen = selected(made, config)
    flat = np.concatenate(list(chosen)) if chosen else np.empty(0, PAIR)
    with_pairs = sum(len(part.names) for part in made)
    dropped[str(DropReason.BELOW_MARGIN)] += kept - with_pairs
    weights, margins = flat["weight"], flat["margin"]
    decided = Counter(objectives[k].name for k in flat["decided_by"].tolist())
    return {
        "prompts": sum(part.groups for part in judged),
        "kept": with_pairs,
        "pairs": len(flat),
        "dropped": {reason: n for reason, n in sorted(dropped.items()) if n},
        "tau": tau,
        "decided_by": dict(sorted(decided.items())),
        "winner_shorter": int((flat["longer"] < 0).sum()),
        "margin": _quantiles(margins),
        "weight": _quantiles(weights),
        "objectives": [[o.name, o.threshold, o.resolution] for o in objectives],
    }


@dataclass(frozen=True, slots=True)
class _Tried:
    """One part under no tau. dets: of the groups that are kept so far and have one; kept_index: which of these each group with pairs is."""

    groups: int
    dropped: Counter[str]
    dets: list[float]
    without_det: int
    made: MadePairs
    kept_index: Any


def _part(objectives: Sequence[Objective], denoise: DenoiseConfig, pairs: PairsConfig, parts: tuple[Part, Part]) -> _Tried:
    pick = partial(best_scored, objectives=objectives)
    maker, index = PairMaker(), list[int]()
    dropped, dets, without_det, groups = Counter[str](), list[float](), 0, 0
    for n, (row, drafts) in enumerate(read_groups(*parts)):
        groups += 1
        group = choose(group_of(row), Drafts(drafts.refined, drafts.placebo), pick)
        verdict = check(group, objectives, denoise, None)
        if verdict.reason:
            dropped[str(verdict.reason)] += 1
            continue
        if verdict.det is None:
            without_det += 1
        else:
            dets.append(verdict.det)
        responses: list[Any] = [*group.candidates, *([group.refined] if group.refined else [])]
        refined = len(group.candidates) if group.refined else None
        if maker.add(n, row.prompt.id, responses, refined, objectives, pairs):
            index.append(len(dets) - 1 if verdict.det is not None else -1)
    return _Tried(groups, dropped, dets, without_det, maker.made(), np.array(index, dtype=np.int64))


def _under(run: Stored, choice: Choice) -> tuple[RunConfig, tuple[Objective, ...]]:
    for text in choice.sets:
        key = text.partition("=")[0]
        if not any(key == free or key.startswith(f"{free}.") for free in FREE):
            raise ConfigError(f"--set {text}: what-if generates and scores nothing anew", hint=f"it can change: {', '.join(FREE)}")
    config = config_from(run.config.model_dump(mode="json"), choice.sets, source=str(run.folder / "config.yaml"))
    names = [o.name for o in run.objectives]
    for given in (*(choice.thresholds or {}), *(choice.resolutions or {}), *(choice.order or ())):
        if given not in names:
            raise ConfigError(f"no objective '{given}'", hint=f"one of: {', '.join(names)}")
    if choice.order is not None and sorted(choice.order) != sorted(names):
        raise ConfigError(
            f"the order {', '.join(choice.order)} does not name every objective once", hint=f"order all of: {', '.join(names)}"
        )
    own = config.self_evaluation
    thresholds: dict[str, Any] = {}
    if own.thresholds != run.config.self_evaluation.thresholds:
        thresholds |= {name: value for name, value in own.thresholds.items() if value != "auto"}
    if not own.use_constitution_thresholds and run.config.self_evaluation.use_constitution_thresholds:
        thresholds = {**dict.fromkeys(names), **thresholds}
    thresholds |= dict(choice.thresholds or {})
    resolutions = dict(choice.resolutions or {})
    changed = [
        o.model_copy(
            update={
                "threshold": thresholds.get(o.name, o.threshold),
                "resolution": resolutions.get(o.name, o.resolution),
            }
        )
        for o in run.objectives
    ]
    rank = {name: i for i, name in enumerate(choice.order or names)}
    return config, tuple(sorted(changed, key=lambda o: rank[o.name]))


def _quantiles(values: Any) -> list[float] | None:
    """Least, quarter, median, three quarters, greatest."""
    return [round(float(q), 4) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1])] if len(values) else None


def choice_from(
    sets: Sequence[str] = (), thresholds: Sequence[str] = (), resolutions: Sequence[str] = (), order: str | None = None
) -> Choice:
    """From the command's words. Raises ConfigError."""
    return Choice(
        tuple(sets),
        _numbers(thresholds, "--threshold") or None,
        _numbers(resolutions, "--resolution") or None,
        tuple(name.strip() for name in order.split(",")) if order else None,
    )


def sweep_of(text: str, choice: Choice) -> tuple[str, dict[str, Choice]]:
    """`denoise.tau=10%,32%` as the option and a choice for each value. Raises ConfigError."""
    option, _, values = text.partition("=")
    every = [v.strip() for v in values.split(",") if v.strip()]
    if not option or not every:
        raise ConfigError(f"--sweep {text!r} is not OPTION=VALUE,VALUE", hint="for example --sweep denoise.tau=10%,32%,90%")
    return option, {value: dataclasses.replace(choice, sets=(*choice.sets, f"{option}={value}")) for value in every}


def apply_to(run: Stored, choice: Choice, ui: Progress) -> None:
    """4-denoise and 5-pair of the run under `choice`; what they replace is set aside. Raises ConfigError where more would have to be."""
    if choice.resolutions or choice.order:
        raise ConfigError(
            "--apply with another order or resolution: these are the constitution's, on which scores and checks depend",
            hint="change the constitution's file and run again with --resume",
        )
    thresholds = {**run.config.self_evaluation.thresholds, **(choice.thresholds or {})}
    if lifted := [name for name, value in thresholds.items() if value is None]:
        raise ConfigError(f"--apply with no threshold for '{lifted[0]}'", hint="--set self_evaluation.use_constitution_thresholds=false")
    sets = [*choice.sets, *(f"self_evaluation.thresholds.{name}={value}" for name, value in (choice.thresholds or {}).items())]
    allow = {"self_evaluation": {"allow_weak_judge": True}}  # leave was given when the run was made
    config = config_from(merge(run.config.model_dump(mode="json"), allow), tuple(sets), source=str(run.folder / "config.yaml"))
    if config.denoise.enabled != run.config.denoise.enabled:
        raise ConfigError(
            "--apply with denoise.enabled: more refined responses would be written", hint="spalign run CONFIG --resume does it"
        )
    config = config.model_copy(update={"runs_dir": str(run.folder.parent), "name": run.folder.name})
    for stage in ("denoise", "pair"):
        run_pipeline(config, mode="resume", only=stage, ui=ui)


def _numbers(texts: Sequence[str], flag: str) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            out[name] = None if value.strip().lower() in ("none", "null") else float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ConfigError(f"{flag} {text!r} is not OBJECTIVE=NUMBER", hint=f"for example {flag} harmlessness=6.5, or =none")
    return out
