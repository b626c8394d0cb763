"""The facts at the end of a run, for a person. Model output is hostile text: control characters are shown as a replacement mark."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spalign.report.card_facts import called
from spalign.text import one_line, printable, shorten


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Funnel, before and after, checks, transcripts, seconds, and where the model is."""
    _funnel(summary, console)
    _scores(summary, console)
    _checks(summary, console)
    _transcripts(summary, console)
    _cost(summary, console)


def print_funnel(funnel: dict[str, Any], console: Console, *, title: str = "Funnel") -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("prompts in", str(funnel["prompts"]))
    for reason, count in funnel["dropped"].items():
        table.add_row(f"  dropped: {reason}", f"-{count}")
    table.add_row("prompts kept", str(funnel["kept"]))
    table.add_row("pairs out", str(funnel["pairs"]))
    console.print(table)
    r = funnel["responses"]
    console.print(
        Text(
            f"of {r['candidates']} candidates {r['unfinished']} were unfinished and {r['empty']} empty; these never enter a pair",
            style="dim",
        )
    )


def _funnel(summary: dict[str, Any], console: Console) -> None:
    console.print()
    for number, iteration in enumerate(summary["iterations"], 1):
        print_funnel(iteration["funnel"], console, title=f"Funnel, iteration {number}, recipe '{summary['recipe']}'")
        console.print(Text(_consistency(iteration["consistency"]), style="dim"))
        training = iteration["training"]
        if training["collapsed"]:
            console.print(
                Text(
                    f"TRAINING STOPPED at step {training['steps']}: {training['collapsed']}. "
                    f"The model is that of step {training['steps_kept']}.",
                    style="bold red",
                )
            )
    for recipe, other in summary["recipes"].items():
        f = other["funnel"]
        reasons = ", ".join(f"{n} {why}" for why, n in f["dropped"].items())
        console.print(
            Text(f"recipe '{recipe}' on the same candidates: {f['kept']} of {f['prompts']} prompts kept, {f['pairs']} pairs ({reasons})")
        )
        console.print(Text(_consistency(other["consistency"]), style="dim"))


def _consistency(of: dict[str, dict[str, int]]) -> str:
    refined, placebo = of["refined"], of["placebo"]
    text = f"consistency rule: {refined['passed']} of {refined['tested']} refined responses pass"
    return text + (f"; placebo (ordinary samples): {placebo['passed']} of {placebo['tested']}" if placebo["tested"] else "")


def _scores(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="Held-out prompts, before and after", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("measure", "on", "before", "after", "difference [95%]"):
        table.add_column(column, justify="left" if column in ("measure", "on") else "right")
    for measure, slices in summary["measures"].items():
        shares = measure in ("refusal", "repetition", "finished")
        for label, by in slices.items():
            if label == "ill_meant":  # stands there as "unsafe"
                continue
            form = ".1%" if shares else ".2f"
            d = by["difference"]
            table.add_row(
                measure if label == "all" else "",
                Text(_safe(label)),  # an intent of the user's file: no markup
                format(by["before"]["mean"], form),
                format(by["after"]["mean"], form),
                f"{d['mean']:+{form}} [{d['ci'][0]:+{form}}, {d['ci'][1]:+{form}}]",
            )
    console.print()
    console.print(table)
    judge = summary["judge"]
    note = (
        f"Scores 0-10 by '{_safe(judge['model'])}', which is not the policy."
        if judge["independent"]
        else "Scores 0-10 by the frozen iteration-0 policy: NOT an independent judge. It shows what was learned, not that it is right."
    )
    console.print(Text(note, style="yellow"))
    for objective, how in judge["objectives"].items():
        met = "" if how["threshold"] is None else f"; met from {how['threshold']:.2f}"
        known = "not checked on labelled answers"
        if how["auc"] is not None:
            known = (
                f"AUC {how['auc']:.2f} [{how['auc_ci'][0]:.2f}, {how['auc_ci'][1]:.2f}] on labelled answers ({how['on']}): {how['verdict']}"
            )
        console.print(
            Text(f"judge of {_safe(objective)}: {how['scorer']}, {known}{met}", style="" if how["verdict"] == "trustworthy" else "yellow")
        )
    if summary["agreement"]:
        _agreement(summary["agreement"], console)


def _agreement(found: dict[str, Any], console: Console) -> None:
    console.print(
        Text(f"against the reference judge '{_safe(found['reference'])}', {found['answers']} answers to {found['prompts']} prompts:")
    )
    for objective, by in found["objectives"].items():
        pearson, within = ("-" if v is None else f"{v:.2f}" for v in (by["pearson"], by["within"]))
        console.print(Text(f"  {_safe(objective)}: correlation {pearson}; order of two answers to a prompt alike in {within}"))
    curve = ", ".join(f"{share:.0%} {value:.2f}" for share, value in found["rv"][3::4] if value is not None)
    console.print(Text(f"  RV coefficient as prompts are added by rising det(Sigma): {curve}"))
    proposed = found["proposed"]
    fall = (
        f"it falls by {proposed['fall']:.2f} after {proposed['share']:.0%}: try denoise.tau {proposed['tau']:.3g}"
        if proposed
        else "it does not fall"
    )
    console.print(Text(f"  {fall}"))


def _checks(summary: dict[str, Any], console: Console) -> None:
    console.print()
    for check in summary["checks"]:
        mark, style = ("ok  ", "green") if check["passed"] else ("FAIL", "bold red")
        console.print(Text(f"{mark} {check['name']}: {check['text']}", style=style))
    if summary["model"] == "demo":
        console.print(
            Text(
                "A 135M model has almost nothing safe to choose from, and judges little better than chance: this run shows the machinery, "
                "not that the model became safe.",
                style="yellow",
            )
        )


def _transcripts(summary: dict[str, Any], console: Console) -> None:
    for t in summary["transcripts"]:
        console.print()
        console.print(Text(f"[{t['intent'] or 'prompt'}] {_safe(t['prompt'])}", style="bold"))
        console.print(Text(f"  before: {_safe(t['before'])}"))
        console.print(Text(f"  after:  {_safe(t['after'])}"))


def _safe(text: str) -> str:
    return shorten(one_line(printable(text)))


def _cost(summary: dict[str, Any], console: Console) -> None:
    console.print()
    slowest = sorted(summary["seconds"].items(), key=lambda kv: -kv[1])
    console.print(Text("seconds: " + ", ".join(f"{where} {s:.0f}" for where, s in slowest if s >= 1), style="dim"))
    if summary["scoring_share"] is not None:
        console.print(
            Text(f"self-evaluation of the candidates took {summary['scoring_share']:.0%} of the time of sampling them", style="dim")
        )
    console.print(Text(f"peak memory {summary['peak_rss_bytes'] / 1e9:.1f} GB", style="dim"))
    _gate(summary, console)


def _gate(summary: dict[str, Any], console: Console) -> None:
    """Whether the model is handed over, and where what is handed over lies."""
    gate = summary["gate"]
    unenforced = "" if gate["enforced"] else " (evaluation.gate.enabled is false: handed over all the same)"
    if gate["passed"]:
        console.print(Text(f"priority gate passed: {_safe(gate['text'])}{unenforced}", style="green"))
    else:
        console.print(Text(f"PRIORITY GATE FAILED ({gate['verdict']}): {_safe(gate['text'])}{unenforced}", style="bold red"))
    for c in gate["checkpoints"]:
        console.print(Text(f"  {called(c)}: {'passes' if c['passed'] else c['verdict']}; {_safe(c['text'])}"))
    if summary["model_path"] is None:
        console.print(Text(f"no model is handed over; the one that failed is kept: {gate['failed_path']}", style="bold red"))
        if proposed := gate["proposed"]:
            console.print(Text(f"proposed, {called(proposed)}: {proposed['path']}", style="bold"))
    else:
        console.print(Text(f"model: {summary['model_path']}", style="bold"))
    console.print(Text("all of it, with every prompt: report.html beside summary.json; or spalign show RUN", style="dim"))
