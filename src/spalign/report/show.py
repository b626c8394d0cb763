"""A run, or one prompt of it, in the terminal. Prompts and answers are hostile text: what drives a terminal is shown as a mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from spalign.report.terminal import print_funnel
from spalign.text import one_line, printable, shorten


def print_run(found: Mapping[str, Any], console: Console) -> None:
    """Funnel of each iteration, and a line a prompt: its verdict, det(Sigma) and pairs."""
    for number, iteration in enumerate(found["iterations"], 1):
        if iteration["funnel"]:
            print_funnel(iteration["funnel"], console, title=f"Funnel, iteration {number}")
        for p in iteration["prompts"]:
            det = "-" if p["det"] is None else f"{p['det']:.3g}"
            verdict = p["reason"] or ("kept" if p["pairs"] else "kept, no pair")
            line = f"{_line(p['id'], 40):40} {verdict:16} det {det:>9}  {p['pairs']:>3} pairs  {_line(p['text'], 80)}"
            console.print(Text(line, style="" if p["reason"] is None else "dim"))


def print_prompt(found: Mapping[str, Any], console: Console, *, whole: bool = False) -> None:
    """One prompt: responses with their scores, why it was kept or dropped, its pairs, and answers before and after."""
    limit = 1_000_000 if whole else 600

    def text(value: str) -> str:
        return shorten(printable(value), limit)

    console.print(Text(f"{_line(found['id'])}  {_line(found['intent'])} {_line(found['topic'])}", style="bold"))
    console.print(Text(text(found["prompt"])))
    for iteration in found["iterations"]:
        console.print()
        verdict = iteration["verdict"]
        state = "not denoised yet" if verdict is None else verdict["reason"] or "kept"
        detail = f": {verdict['detail']}" if verdict and verdict["detail"] else ""
        console.print(Text(f"iteration {iteration['number']}: {state}{_line(detail)}", style="bold"))
        for r in iteration["responses"]:
            scores = ", ".join(f"{_line(o)} {s:.2f}" for o, s in r["scores"].items()) or "no scores"
            cut = "" if r["finished"] else ", cut off"
            console.print(Text(f"\n{r['name']} [{_line(r['kind'])}] {scores}{cut}", style="cyan"))
            console.print(Text(text(r["text"])))
        for p in iteration["pairs"]:
            what = f"margin {p['margin']:.2f}, weight {p['weight']:.2f}, decided by {_line(p['decided_by'])}"
            console.print(Text(f"pair: {p['chosen']} > {p['rejected']}  ({what})", style="green"))
    for when, answers in found["answers"].items():
        for n, answer in enumerate(answers, 1):
            scores = ", ".join(f"{_line(o)} {s:.2f}" for o, s in answer["scores"].items())
            console.print(Text(f"\n{when} training, answer {n} {scores}", style="cyan"))
            console.print(Text(text(answer["text"])))


def print_comparison(runs: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Two runs' summaries side by side: what differs in the configuration, the funnel, and before and after."""
    first, second = runs
    console.print(Text(f"A: {_line(first['name'])}    B: {_line(second['name'])}", style="bold"))
    for line in _differences(first["config"], second["config"]):
        console.print(Text(f"  {_line(line, 200)}"))
    a, b = first["summary"], second["summary"]
    for name in ("prompts", "kept", "pairs"):
        console.print(Text(f"{name:24} {a['funnel'][name]:>10,} {b['funnel'][name]:>10,}"))
    for reason in sorted({*a["funnel"]["dropped"], *b["funnel"]["dropped"]}):
        console.print(
            Text(f"  dropped: {reason:13} {a['funnel']['dropped'].get(reason, 0):>10,} {b['funnel']['dropped'].get(reason, 0):>10,}")
        )
    for measure in dict.fromkeys((*a["measures"], *b["measures"])):
        cells = []
        for s in (a, b):
            d = s["measures"].get(measure, {}).get("all")
            cells.append(
                "-"
                if d is None
                else f"{d['before']['mean']:.2f} -> {d['after']['mean']:.2f} ({d['difference']['mean']:+.2f} {d['difference']['ci']})"
            )
        console.print(Text(f"{_line(measure):24} {cells[0]:40} {cells[1]:40}"))
    if a["prompts"]["heldout"]["sha256"] != b["prompts"]["heldout"]["sha256"]:
        console.print(Text("the held-out prompts differ: before and after of one run cannot be held against the other's", style="yellow"))
    if a["judge"] != b["judge"]:
        console.print(Text("the judges differ: scores of one run cannot be held against the other's", style="yellow"))
    for s in (a, b):
        gate = s["gate"]
        console.print(Text(f"gate of {_line(s['name'])}: {'passed' if gate['passed'] else gate['verdict']}; {_line(gate['text'], 200)}"))


def _differences(a: Any, b: Any, at: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [line for k in sorted({*a, *b}) for line in _differences(a.get(k), b.get(k), f"{at}.{k}" if at else k)]
    return [] if a == b else [f"{at}: {a} | {b}"]


def _line(value: Any, limit: int = 120) -> str:
    return shorten(one_line(printable(str(value))), limit)
