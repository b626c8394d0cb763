"""What-if in the terminal: a column a choice, and a sweep as a table with bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_BAR = 30


def print_what_if(found: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """found: name of a choice -> its figures, the run's own first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", *found):
        table.add_column(Text(column), justify="left" if not column else "right")
    reasons = list(dict.fromkeys(r for f in found.values() for r in f["dropped"]))
    objectives = list(dict.fromkeys(o for f in found.values() for o, *_ in f["objectives"]))

    def row(name: str, values: Sequence[Any]) -> None:
        table.add_row(Text(name), *("-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3g}" for v in values))

    every = list(found.values())
    row("prompts in", [f["prompts"] for f in every])
    for reason in reasons:
        row(f"  dropped: {reason}", [-f["dropped"].get(reason, 0) for f in every])
    row("prompts kept", [f["kept"] for f in every])
    row("pairs", [f["pairs"] for f in every])
    for o in objectives:
        row(f"  decided by {o}", [f["decided_by"].get(o, 0) for f in every])
    row("winner shorter", [f["winner_shorter"] for f in every])
    row("tau", [f["tau"] for f in every])
    for name in ("margin", "weight"):
        for place, which in ((0, "least"), (2, "median"), (4, "greatest")):
            row(f"{name}, {which}", [f[name][place] if f[name] else None for f in every])
    console.print(table)


def print_sweep(option: str, found: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """found: value of the option -> figures."""
    most = max((f["kept"] for f in found.values()), default=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in (option, "kept", "pairs", "tau", "prompts kept"):
        table.add_column(Text(column), justify="left" if column in (option, "prompts kept") else "right")
    for value, f in found.items():
        bar = "█" * round(_BAR * f["kept"] / most) if most else ""
        table.add_row(Text(value), f"{f['kept']:,}", f"{f['pairs']:,}", "-" if f["tau"] is None else f"{f['tau']:.3g}", bar)
    console.print(table)
