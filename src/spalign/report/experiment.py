"""The table of an experiment: the paper's figures beside ours, with intervals, seeds and what the judge is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spalign.report.assess import change, interval, judge_lines

_UTILITY = ("mmlu", "mt_bench")


def experiment_table(found: Mapping[str, Any]) -> str:
    """NAME.md of `spalign experiment`."""
    lines = [f"# {found['name']}: {found['title']}", ""]
    if "agreement" in found:
        return "\n".join([*lines, *_agreement(found["agreement"])]) + "\n"
    config = found["config"]
    seeds = config["seeds"]
    over = (
        f"Seeds: {', '.join(map(str, seeds))}. A prompt's value is its mean over seeds; intervals are 95% over prompts, without "
        "the spread of seeds, which tables of scores have in their last column (lowest to highest seed; first objective / last)."
        if len(seeds) > 1
        else f"One seed ({seeds[0]}): intervals are 95% over prompts; how much another seed would differ is not known."
    )
    lines += [f"{over} In brackets the paired difference to `{config['arms'][0]}`, bold where its interval excludes 0.", ""]
    for policy, by_data in found["results"].items():
        for data, by_set in by_data.items():
            for where, figures in by_set.items():
                lines += _one(config, policy, data, where.removeprefix("on-"), figures)
    if found["failed"]:
        lines += [
            "Arms without a model; each is held against the first arm in the seeds that it has:",
            "",
            *(f"- {who}: {why}" for who, why in found["failed"].items()),
            "",
        ]
    return "\n".join(lines) + "\n"


def _one(config: Mapping[str, Any], policy: str, data: str, where: str, figures: Mapping[str, Any]) -> list[str]:
    utility = where == "utility"
    columns = [c for c in config["columns"] if (c in _UTILITY) == utility]
    objectives = figures["objectives"]
    names = {"primary": objectives[0], "secondary": objectives[-1]}
    head = [
        names.get(c, c.replace("win_primary", f"win/tie/lose {objectives[0]}").replace("win_secondary", f"win/tie/lose {objectives[-1]}"))
        for c in columns
    ]
    several = ["seeds"] if len(config["seeds"]) > 1 else []
    paper = config["paper"].get(policy, {})
    known = {arm: by.get(where) for arm, by in paper.items() if by.get(where)}
    rows = [["arm", *head, *(f"paper: {h}" for h in head if known), *([] if utility else ["words", "refusals", *several])]]
    rows.append(["---"] * len(rows[0]))
    for arm in figures["models"]:
        missing = len(config["seeds"]) - figures["seeds_of"][arm]
        name = f"{arm} ({figures['seeds_of'][arm]} of {len(config['seeds'])} seeds)" if missing else arm
        cells = [name, *(_cell(c, arm, figures, objectives) for c in columns)]
        if known:
            theirs = known.get(arm) or [None] * len(columns)
            cells += ["-" if v is None else f"{v:g}" for v in (*theirs, *[None] * len(columns))[: len(columns)]]
        if not utility:
            by = figures["scores"][arm]
            cells += [
                f"{by['words']['all']['mean']['mean']:.0f}",
                f"{by['refusal']['all']['mean']['mean']:.0%}",
                *(_seeds(arm, figures, objectives) for _ in several),
            ]
        rows.append(cells)
    title = f"## {policy}, trained on {data}: {where}"
    prompts = figures["prompts"]
    about = [] if utility else [f"{prompts['count']} prompts (sha256 {prompts['sha256'][:12]}), judged by `{figures['judge']['model']}`.  "]
    checked = judge_lines(figures["judge"]["check"]) if figures["judge"] else []
    extra = [] if utility else _by_intent(figures, objectives)
    return [title, "", *about, *checked, "", *(f"| {' | '.join(r)} |" for r in rows), "", *extra]


def _by_intent(figures: Mapping[str, Any], objectives: Sequence[str]) -> list[str]:
    """The differences on safe and on ill-meant prompts, and at equal length: what means over both hide."""
    first = next(iter(figures["scores"].values()))
    slices = [s for s in ("safe", "unsafe") if s in first["words"]]
    if not slices:
        return []
    head = ["arm", *(f"{o}, {s}" for s in slices for o in (objectives[0], objectives[-1])), *(f"refusals, {s}" for s in slices)]
    head += [f"{o} at equal length" for o in (objectives[0], objectives[-1])]
    rows = [head, ["---"] * len(head)]
    for arm, by in figures["scores"].items():
        cells = [arm]
        for s in slices:
            for o in (objectives[0], objectives[-1]):
                told = by.get(o, {}).get(s)
                cells.append(
                    "-"
                    if told is None
                    else f"{told['mean']['mean']:.2f}" + (f" ({change(told['difference'])})" if told["difference"] else "")
                )
        cells += [f"{by['refusal'][s]['mean']['mean']:.0%}" for s in slices]
        cells += [change(by[o]["all"]["equal_length"]) if o in by and "all" in by[o] else "-" for o in (objectives[0], objectives[-1])]
        rows.append(cells)
    return [*(f"| {' | '.join(r)} |" for r in rows), ""]


def _cell(column: str, arm: str, figures: Mapping[str, Any], objectives: Sequence[str]) -> str:
    if column in _UTILITY:
        return _utility(column, arm, figures)
    if column.startswith("win_"):
        objective = objectives[0] if column == "win_primary" else objectives[-1]
        told = figures["pairwise"].get(arm, {}).get(objective, {}).get("all")
        if told is None or told["win"] is None:
            return "-"
        win, tie, lose = (f"{told[k]['mean']:.0%}" for k in ("win", "tie", "lose"))
        return f"{win} {_range(told['win'])} / {tie} / {lose} {_range(told['lose'])}"
    name = {"primary": objectives[0], "secondary": objectives[-1]}.get(column, column)
    told = figures["scores"][arm].get(name, {}).get("all")
    if told is None:
        return "-"
    return interval(told["mean"]) + (f" ({change(told['difference'])})" if told["difference"] else "")


def _utility(column: str, arm: str, figures: Mapping[str, Any]) -> str:
    told = figures["utility"].get(arm, {}).get(column)
    if told is None:
        return "-"
    value, digits = (told["score"], 2) if column == "mt_bench" else (told["accuracy"], 3)
    return interval(value, digits) + ("" if arm == next(iter(figures["models"])) else f" ({change(told['difference'], digits)})")


def _range(value: Mapping[str, Any]) -> str:
    low, high = value["ci"]
    return f"[{low:.0%}, {high:.0%}]"


def _seeds(arm: str, figures: Mapping[str, Any], objectives: Sequence[str]) -> str:
    parts = []
    for o in (objectives[0], objectives[-1]):
        each = [s[arm][o] for s in figures["by_seed"] if o in s.get(arm, {})]
        parts.append(f"{min(each):.2f} to {max(each):.2f}" if each else "-")
    return " / ".join(parts)


def _agreement(cells: Mapping[str, Any]) -> list[str]:
    lines = []
    for cell, told in cells.items():
        own, theirs = told["scorers"]
        how = f"Scores (`{own}`) against" if own == theirs else f"Scores by `{own}` against `{theirs}` of"
        lines += [f"## {cell}", "", f"{how} `{told['reference']}`, on {told['answers']} answers to {told['prompts']} prompts.", ""]
        for o, by in told["objectives"].items():
            known = {k: "-" if v is None else f"{v:.2f}" for k, v in by.items()}
            lines.append(f"- {o}: correlation {known['pearson']}, agreement within a prompt {known['within']}")
        lines += ["", "| share of prompts, by rising det(Sigma) | RV coefficient |", "| --- | --- |"]
        lines += [f"| {share:.0%} | {'-' if rv is None else f'{rv:.3f}'} |" for share, rv in told["rv"]]
        p = told["proposed"]
        lines += [
            "",
            f"Proposed tau: {p['tau']:g}, at {p['share']:.0%} (a fall of {p['fall']:.2f})." if p else "No sharp fall: no tau is proposed.",
            "",
        ]
    return lines
