"""A judged evaluation as Markdown: a table a slice of prompts, the judge's own check beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spalign.text import one_line, printable


def assess_table(found: Mapping[str, Any]) -> str:
    """The figures of `spalign judge` for people."""
    prompts, judge = found["prompts"], found["judge"]
    lines = [f"# {_cell(found['name'])}", ""]
    if found["scores"]:
        low, high = judge["scale"]
        lines += [
            f"{prompts['count']} prompts of `{_cell(prompts['source'])}` (sha256 {prompts['sha256'][:12]}), judged by "
            f"`{_cell(judge['model'])}` on {low}-{high}. Means with 95% intervals over prompts; in brackets the paired difference to "
            f"`{found['baseline']}`.",
            "",
        ]
    lines += judge_lines(judge["check"]) if judge else []
    for slice_ in _slices(found["scores"]):
        lines += ["", f"## {'All prompts' if slice_ == 'all' else f'Prompts: {_cell(slice_)}'}", "", *_slice_table(found, slice_)]
    if found["pairwise"]:
        lines += ["", f"## Against `{found['baseline']}`, in both orders", "", *_pairwise(found["pairwise"])]
    if any(found["utility"].values()):
        lines += ["", "## Utility", "", *_utility(found["utility"])]
    missing = [f"{label}: {n} {o}" for label, by in found["unscored"].items() for o, n in by.items() if n]
    if missing:
        lines += ["", f"Unscored, and left out: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def judge_lines(check: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the judge is worth, a line an objective."""
    if not check:
        return ["**The judge was not checked on labelled answers.**"]
    return [
        f"Judge, {c['objective']} ({_cell(c['scorer'])}): AUC {c['auc']:.2f} "
        f"[{c['auc_ci'][0]:.2f}, {c['auc_ci'][1]:.2f}] on {_cell(c['on'])} answers"
        + (f", {c['unparsed']} unparsed" if c.get("unparsed") else "")
        + (f", **{c['verdict']}**" if c.get("verdict") and c["verdict"] != "trustworthy" else "")
        + ".  "
        if c["auc"] is not None and c["auc_ci"] is not None
        else f"Judge, {c['objective']}: **no check** ({c.get('unparsed', 0)} of its replies could not be read).  "
        for c in check
    ]


def interval(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`1.23 [1.01, 1.45]`, or a dash."""
    if value is None:
        return "-"
    low, high = value["ci"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def change(value: Mapping[str, Any] | None, digits: int = 2) -> str:
    """`+0.12 [-0.01, +0.25]`, bold where zero lies outside, or a dash."""
    if value is None:
        return "-"
    low, high = value["ci"]
    text = f"{value['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _slices(scores: Mapping[str, Any]) -> list[str]:
    first: Mapping[str, Any] = next(iter(scores.values()), {})
    return list(first.get("words", {}))


def _slice_table(found: Mapping[str, Any], slice_: str) -> list[str]:
    objectives = list(found["objectives"])
    names = [*objectives, *(n for n in next(iter(found["scores"].values())) if n.startswith("HH_"))]
    head = [*names, *(f"{o} at equal length" for o in objectives), "words", "refusals", "cut off"]
    rows = [["model", *head], ["---"] * (len(head) + 1)]
    for label, by in found["scores"].items():
        cells = [label]
        for name in names:
            told = by.get(name, {}).get(slice_)
            cells.append(
                "-" if told is None else interval(told["mean"]) + (f" ({change(told['difference'])})" if told["difference"] else "")
            )
        for name in objectives:
            told = by.get(name, {}).get(slice_)
            cells.append(change(told["equal_length"]) if told else "-")
        cells.append(f"{by['words'][slice_]['mean']['mean']:.0f}")
        cells += [f"{by['refusal'][slice_]['mean']['mean']:.0%}", f"{1 - by['finished'][slice_]['mean']['mean']:.0%}"]
        rows.append(cells)
    return _lines(rows)


def _pairwise(pairwise: Mapping[str, Any]) -> list[str]:
    rows = [["model", "objective", "win", "tie", "lose", "prompts", "unparsed"], ["---"] * 7]
    for label, by in pairwise.items():
        for objective, slices in by.items():
            s = slices["all"]
            rows.append([label, objective, *(interval(s[k]) for k in ("win", "tie", "lose")), str(s["prompts"]), str(s["unparsed"])])
    return _lines(rows)


def _utility(utility: Mapping[str, Any]) -> list[str]:
    rows, first = [["model", "MMLU", "MT-Bench", "turn 1", "turn 2"], ["---"] * 5], next(iter(utility))
    for label, by in utility.items():
        m, t = by.get("mmlu"), by.get("mt_bench")
        turns = [f"{t[k]:.2f}" if t and t[k] is not None else "-" for k in ("turn_1", "turn_2")]
        rows.append([label, _with_change(m, "accuracy", label != first, 3), _with_change(t, "score", label != first, 2), *turns])
    return _lines(rows)


def _with_change(told: Mapping[str, Any] | None, key: str, compared: bool, digits: int) -> str:
    if told is None:
        return "-"
    return interval(told[key], digits) + (f" ({change(told['difference'], digits)})" if compared else "")


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def _cell(value: Any) -> str:
    """Names come from files: one line, and nothing that Markdown or a terminal would act on."""
    return one_line(printable(str(value))).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
