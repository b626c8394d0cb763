"""What judge-check found, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spalign.text import one_line, printable

_MEANING = {
    "trustworthy": "it tells good answers from bad ones; align on it",
    "weak": "better than chance, not good; look at what it keeps, or use a stronger judge",
    "at chance": "on some kind of answers it may be guessing; do not align on it",
}
_STYLE = {"trustworthy": "bold green", "weak": "bold yellow", "at chance": "bold red"}


def print_judge(found: Mapping[str, Any], console: Console) -> None:
    """found: as of `JudgeCheck.to_json`, with `thresholds` and `skipped`."""
    wide = Console(file=console.file, width=max(console.width, 190)) if not console.is_terminal else console  # a pipe has no width
    for objective, by in found["objectives"].items():
        _table(objective, by, found["recommended"].get(objective), wide)
    for scorer, why in found["skipped"].items():
        console.print(Text(f"not asked: {scorer}: {why}", style="yellow"))
    console.print()
    for objective, by in found["objectives"].items():
        chosen = found["recommended"].get(objective)
        if chosen is None:
            console.print(Text(f"{_safe(objective)}: AT CHANCE: no scorer ranks good answers above bad ones", style="bold red"))
            continue
        r = by[chosen]
        console.print(Text(f"{_safe(objective)}: {r['verdict'].upper()} by {chosen}: {_MEANING[r['verdict']]}", style=_STYLE[r["verdict"]]))
        low, high = r["threshold_ci"]
        console.print(Text(f"  an answer counts as good from {r['threshold']:.2f} [{low:.2f}, {high:.2f}] on its 0-10 scale"))


def _table(objective: str, by: Mapping[str, Any], chosen: str | None, console: Console) -> None:
    if not by:
        return
    rows = next(iter(by.values()))["rows"]
    table = Table(title=f"{_safe(objective)}: {rows} labelled answers", title_justify="left", box=None, padding=(0, 2, 0, 0))
    sources = list(dict.fromkeys(s for r in by.values() for s in r["by_source"]))
    if len(sources) < 2:
        sources = []
    figures = ("acc", "ceil", "floor", "unscored", "retest", "spread", "length", "flips", "injection", "s/100", "verdict")
    for column in ("scorer", "AUC [95%]", *(f"on {_safe(s)}" for s in sources), *figures):
        table.add_column(column, justify="left" if column in ("scorer", "verdict") else "right", no_wrap=True)
    for scorer, r in by.items():
        table.add_row(
            Text(f"{scorer} *" if scorer == chosen else scorer, style="bold" if scorer == chosen else ""),
            _area(r),
            *(_area(r["by_source"].get(s)) for s in sources),
            *(_form(r[k], ".0%") for k in ("accuracy", "ceiling", "floor")),
            str(r["unscored"]),
            *(_form(r[k], ".2f") for k in ("retest", "spread")),
            _form(r["length_correlation"], "+.2f"),
            _form(r["flip_rate"], ".0%"),
            _form(r["injection_shift"], "+.2f"),
            _form(r["seconds_per_100"], ".1f"),
            r["verdict"],
        )
    console.print()
    console.print(table)


def _area(r: Mapping[str, Any] | None) -> str:
    if r is None or r["auc"] is None or r["auc_ci"][0] is None:
        return "-"
    return f"{r['auc']:.2f} [{r['auc_ci'][0]:.2f}, {r['auc_ci'][1]:.2f}]"


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _safe(text: str) -> str:
    return one_line(printable(text))
