"""What a model card says of a run's data, judge and scores: sections of Markdown, made from summary.json alone; all of it escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spalign.config.parts import BETA
from spalign.text import one_line, printable, shorten

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_MARKUP = re.compile(
    r"[&<`*~\\|$@{}]"  # wherever they stand
    r"|\](?=[\[(:]|$)|:(?!\s)|(?<=www)\."  # links, also bare ones
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; not within_a_word
    r"|^[^\w\s]|(?<=\d)[.)](?=\s|$)",  # what begins a heading, a list, a quotation
    re.IGNORECASE,
)
_LOSSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "spa": ("uncertainty-guided SimPO (SPA, Eq. 3)", ("beta", "gamma", "alpha")),
    "simpo": ("SimPO, all pairs alike", ("beta", "gamma")),
    "dpo": ("DPO, against the policy as it was", ("beta",)),
    "sft": ("SFT on the chosen responses", ()),
}
"""What a loss is called, and which of its options it has."""
_SHARES = ("refusal", "repetition", "finished")


def escaped(text: object, limit: int = 200) -> str:
    """`text` on one line, to be read as it is: what Markdown or HTML would act on stands as a numeric entity."""
    plain = shorten(one_line(printable(str(text))), limit)
    return _MARKUP.sub(lambda m: f"&#{ord(m[0])};", plain)


def last_part(path: object) -> str:
    return str(path).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def called(tried: Mapping[str, Any]) -> str:
    """What the gate tries or proposes, by name: one without a step is an earlier iteration's finished model."""
    return f"iteration {tried['iteration']}'s model" if tried["step"] is None else f"checkpoint {tried['step']}"


def answers_of(tried: Mapping[str, Any]) -> str:
    """Where the run has its judged answers."""
    return f"evaluation/iteration-{tried['iteration']}" if tried["step"] is None else f"evaluation/checkpoint-{tried['step']}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def data(summary: Mapping[str, Any]) -> str:
    sets = summary.get("prompts")
    if not sets:
        return f"{summary['funnel']['prompts']} prompts; their source is not on record."
    rows = []
    for use, p in sets.items():
        source = last_part(p["source"]) if p["kind"] == "file" else p["source"]
        rows.append((escaped(use), escaped(source), escaped(p["kind"]), str(p["count"]), escaped(p["sha256"])))
    text = table(("use", "source", "kind", "prompts", "sha256"), rows)
    text += "\n\nOnly prompts are taken from these sets. No training prompt stands among the held-out ones."
    if train := summary.get("train"):
        kind = loss(summary)
        named, own = _LOSSES[kind]
        used = {**train, "beta": train.get("beta") or BETA[kind]}
        keys = ["learning_rate", "epochs", "prompts_per_step", *own, "scheduler", "warmup_ratio"]
        if own and train.get("sft_weight"):
            keys.insert(-2, "sft_weight")
        settings = ", ".join(f"{escaped(k)} {escaped(used[k])}" for k in keys if k in used)
        text += f"\n\nTraining ({named}): {settings}, seed {escaped(summary.get('seed'))}."
    return text


def loss(summary: Mapping[str, Any]) -> str:
    """`train.loss`; older summaries have none, and there was one."""
    return str((summary.get("train") or {}).get("loss", "spa"))


def funnels(summary: Mapping[str, Any], step: int | None) -> str:
    parts = []
    for number, iteration in enumerate(summary["iterations"], 1):
        f, t = iteration["funnel"], iteration["training"]
        rows = [("prompts in", str(f["prompts"]))]
        rows += [(f"dropped: {escaped(reason)}", f"-{count}") for reason, count in f["dropped"].items()]
        rows += [("prompts kept", str(f["kept"]))]
        rows += [(f"pairs removed: {escaped(why)}", f"-{count}") for why, count in f["pairs_removed"].items()]
        rows += [("pairs out", str(f["pairs"])), ("of them with the shorter answer chosen", str(f["winner_shorter"]))]
        rows += [(f"of them decided by {escaped(o)}", str(count)) for o, count in f["decided_by"].items()]
        r, c = f["responses"], iteration["consistency"]
        lines = [
            table((f"iteration {number}", "count"), rows),
            f"Of {r['candidates']} candidates {r['unfinished']} were unfinished and {r['empty']} empty; these enter no pair. "
            f"Consistency rule: {_passed(c['refined'])} refined answers pass"
            + (f", {_passed(c['placebo'])} of the placebo (ordinary samples)." if c["placebo"]["tested"] else "; no placebo was tested."),
            f"Training: {t['steps']} steps on {t['prompts']} prompts; the model is that of step {t['steps_kept']}"
            + (f", this checkpoint that of step {step}." if step is not None and number == len(summary["iterations"]) else "."),
        ]
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def _passed(of: Mapping[str, int]) -> str:
    return f"{of['passed']} of {of['tested']}"


def constitution(summary: Mapping[str, Any]) -> str:
    c = summary["constitution"]
    order = "\n".join(f"{i}. {escaped(o)}" for i, o in enumerate(c["objectives"], 1))
    return f"**{escaped(c['name'])}**, sha256 {escaped(c['sha256'])}. Objectives in order of priority:\n\n{order}"


def judge(summary: Mapping[str, Any]) -> str:
    judge = summary["judge"]
    rows = [
        (
            escaped(name),
            escaped(how["scorer"]),
            "not checked" if how["auc"] is None else f"{how['auc']:.2f} {interval(how['auc_ci'], '.2f')}",
            escaped(how["on"] or "-"),
            "-" if how["threshold"] is None else f"{how['threshold']:.2f}",
            escaped(how["verdict"] or "not checked"),
        )
        for name, how in judge["objectives"].items()
    ]
    who = (
        f"Another model than the policy: {escaped(judge['model'] if HUB_ID.fullmatch(judge['model']) else last_part(judge['model']))}."
        if judge["independent"]
        else "The frozen starting model itself: **not an independent judge**. Its scores show what was learned, not that it is right."
    )
    return f"{who}\n\n" + table(("objective", "asked how", "AUC [95%] on labelled answers", "on", "met from", "verdict"), rows)


def scores(summary: Mapping[str, Any]) -> str:
    rows = []
    for measure, slices in summary["measures"].items():
        form = ".1%" if measure in _SHARES else ".2f"
        for label, by in slices.items():
            if label == "ill_meant" and "unsafe" in slices:  # the same prompts
                continue
            cells = (f"{by[k]['mean']:{form}} {interval(by[k]['ci'], form)}" for k in ("before", "after"))
            rows.append((escaped(measure), escaped(label), *cells, difference(measure, by)))
    text = table(("measure", "on", "before [95%]", "after [95%]", "difference [95%]"), rows)
    unscored = summary["unscored"]
    return (
        f"{text}\n\n95% bootstrap intervals over prompts, differences paired by prompt. Objectives are scored 0 to 10, more is better. "
        f"Answers without a score, left out: {unscored['before']} before, {unscored['after']} after."
    )


def difference(measure: str, by: Mapping[str, Any]) -> str:
    form = "+.1%" if measure in _SHARES else "+.2f"
    return f"{by['difference']['mean']:{form}} {interval(by['difference']['ci'], form)}"


def interval(ci: Sequence[float | None], form: str) -> str:
    low, high = ("-" if v is None else format(v, form) for v in ci)
    return f"[{low}, {high}]"


def check_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(escaped(c["name"]), "passed" if c["passed"] else "**FAILED**", escaped(c["text"])) for c in summary["checks"]]


def tries(summary: Mapping[str, Any]) -> str:
    """The final model and the others after it, in the order in which they were tried."""
    gate = summary["gate"]
    tried = [("final model", gate), *((called(c), c) for c in gate["checkpoints"])]
    rows = [(who, "passed" if g["passed"] else f"**FAILED** ({escaped(g['verdict'])})", escaped(g["text"])) for who, g in tried]
    text = table(("model", "result", "figures"), rows)
    return f"{text}\n\nDifferences are after - before of the same held-out prompts, on a scale of 0 to 10, by the judge above."


def versions(summary: Mapping[str, Any], adapter: bool) -> str:
    text = ", ".join(f"{escaped(k)} {escaped(v)}" for k, v in summary["versions"].items())
    peft = summary["versions"].get("peft")
    return f"{text}\n\n### Framework versions\n\n- PEFT {escaped(peft)}" if adapter and peft else text  # as PEFT writes it
