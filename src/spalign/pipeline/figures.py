"""The figures of a judged evaluation, of one seed or of several taken together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from spalign import prompts as prompt_sets
from spalign.config import AssessConfig
from spalign.evaluation import assessed, bootstrap_mean, win_tie_lose
from spalign.types import Prompt, PromptGroup


@dataclasses.dataclass
class Judged:
    """What was answered and said of it; label -> ...

    groups: the prompts with their judged answers. verdicts: objective -> (intent, value) of every prompt, against the first label's.
    mmlu: 1 or 0 for every question. mt_bench: of every question its two turns' scores.
    """

    config: AssessConfig
    objectives: list[str]
    prompts: list[Prompt]
    judge: dict[str, Any] | None
    groups: dict[str, list[PromptGroup]]
    verdicts: dict[str, dict[str, list[tuple[str, float | None]]]]
    mmlu: dict[str, list[int]]
    mt_bench: dict[str, list[tuple[float | None, float | None]]]


def figures(seeds: Sequence[Judged]) -> dict[str, Any]:
    """The figures of one evaluation, or of the same with other seeds: a prompt's value is then its mean over them."""
    first = seeds[0]
    config, names = first.config, first.objectives
    how = {"resamples": config.bootstrap, "seed": config.seed}
    groups = {label: [_together(same) for same in zip(*(s.groups[label] for s in seeds), strict=True)] for label in first.groups}
    verdicts = {
        label: {
            o: win_tie_lose(
                [(same[0][0], [v for _, v in same]) for same in zip(*(s.verdicts[label][o] for s in seeds), strict=True)], **how
            )
            for o in names
        }
        for label in first.verdicts
    }
    return {
        "name": config.name,
        "models": dict(config.models),
        "baseline": next(iter(config.models)),
        "objectives": names,
        "lambdas": list(config.lambdas),
        "seeds": len(seeds),
        "prompts": {
            "source": config.prompts.source if config.prompts else None,
            "count": len(first.prompts),
            **({"sha256": prompt_sets.sha256(first.prompts)} if first.prompts else {}),
        },
        "answer": config.answer.model_dump(),
        "judge": first.judge,
        "scores": assessed(groups, names, config.lambdas, **how) if groups else {},
        "unscored": {
            label: {n: sum(n not in r.scores for g in found for r in g.candidates) for n in names} for label, found in groups.items()
        },
        "pairwise": verdicts,
        "utility": {label: _utility(label, seeds) for label in config.models},
    }


def _together(same: Sequence[PromptGroup]) -> PromptGroup:
    """One prompt with the answers of all seeds."""
    return same[0].replace(candidates=tuple(r for g in same for r in g.candidates))


def _utility(label: str, seeds: Sequence[Judged]) -> dict[str, Any]:
    config, out = seeds[0].config, dict[str, Any]()
    how = {"resamples": config.bootstrap, "seed": config.seed}
    if rows := [s.mmlu[label] for s in seeds if label in s.mmlu]:
        each = [sum(same) / len(same) for same in zip(*rows, strict=True)]
        out["mmlu"] = {"questions": len(each), "accuracy": bootstrap_mean(each, **how).to_json()}
        base = [s.mmlu[next(iter(config.models))] for s in seeds]
        theirs = [sum(same) / len(same) for same in zip(*base, strict=True)]
        out["mmlu"]["difference"] = bootstrap_mean([x - y for x, y in zip(each, theirs, strict=True)], **how).to_json()
    if pairs := [s.mt_bench[label] for s in seeds if label in s.mt_bench]:
        turns = [[v for s in pairs for both in s if (v := both[turn]) is not None] for turn in (0, 1)]
        mine, first = _by_question(pairs), _by_question([s.mt_bench[next(iter(config.models))] for s in seeds])
        means = [m for m in mine if m is not None]
        gained = [m - f for m, f in zip(mine, first, strict=True) if m is not None and f is not None]
        out["mt_bench"] = {
            "questions": len(pairs[0]),
            "score": bootstrap_mean(means, **how).to_json() if means else None,
            "difference": bootstrap_mean(gained, **how).to_json() if gained else None,
            **{f"turn_{n}": sum(k) / len(k) if k else None for n, k in enumerate(turns, 1)},
            "unparsed": sum(v is None for s in pairs for both in s for v in both),
        }
    return out


def _by_question(seeds: Sequence[Sequence[tuple[float | None, float | None]]]) -> list[float | None]:
    """Of every question the mean over its scored turns and seeds."""
    every = [[v for both in same for v in both if v is not None] for same in zip(*seeds, strict=True)]
    return [sum(scored) / len(scored) if scored else None for scored in every]
