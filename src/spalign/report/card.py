"""The model card: README.md of a run's model, written from summary.json alone.

Names, reasons and paths in it come from files, models and users: all of it is escaped, so that it can neither draw a table, a link or a
heading, nor run as HTML, nor add a line to the YAML head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from spalign.config.engine import VLLM_RANKS
from spalign.report import card_facts as facts
from spalign.report.card_facts import escaped

_DEMO_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_card(summary: Mapping[str, Any], *, adapter: bool = False, proposed: bool = False) -> str:
    """The card as Markdown with its YAML head. adapter: for the folder of the adapter instead of the whole model. proposed: for the
    checkpoint, or the earlier iteration's model, that the gate proposes instead of the final model; then that one's scores and checks are
    left out, and so are later iterations."""
    other = summary["gate"]["proposed"] if proposed else None
    step = other["step"] if other else None
    if other and step is None:
        summary = {**summary, "iterations": summary["iterations"][: other["iteration"]]}
    title = escaped(summary["name"]) + (f", {facts.called(other)}" if other else "")
    measured = {
        "Scores on held-out prompts": facts.scores,
        "Checks": lambda s: facts.table(("check", "result", "figures"), facts.check_rows(s)),
    }
    parts = [
        _head(summary, adapter),
        f"# {title}\n\n{_what(summary, adapter, other)}",
        "## Results in brief\n\n" + _bullets(_of_the_proposed(summary, other) if other else _of_the_model(summary)),
        "## How to load\n\n" + _load(summary, adapter),
        "## Training data\n\n" + facts.data(summary),
        "## From prompts to pairs\n\n" + facts.funnels(summary, step),
        "## Constitution\n\n" + facts.constitution(summary),
        "## Judge\n\n" + facts.judge(summary),
        *(f"## {heading}\n\n{text(summary)}" for heading, text in ({"Priority gate": facts.tries} if proposed else measured).items()),
        "## Limits\n\n" + _bullets(_limits(summary, other)),
        "## Versions\n\n" + facts.versions(summary, adapter),
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _base(summary: Mapping[str, Any]) -> str | None:
    """The base model's hub id; None where it came from a file or folder."""
    if summary["model"] == "demo":
        return _DEMO_HUB
    fingerprint = str(summary.get("model_fingerprint", ""))
    name = fingerprint.removeprefix("hub:")
    return name if name != fingerprint and facts.HUB_ID.fullmatch(name) else None


def _base_name(summary: Mapping[str, Any]) -> str:
    """How the text names the base: its hub id, or the last part of its path: a card is no place for the folders of a machine."""
    return _base(summary) or facts.last_part(summary["model"])


def _lora(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return (summary.get("train") or {}).get("lora")


def _on_the_base(summary: Mapping[str, Any]) -> bool:
    """Whether the last adapter belongs on the base itself: after a second iteration it belongs on the first one's merged model."""
    return len(summary["iterations"]) == 1


def _head(summary: Mapping[str, Any], adapter: bool) -> str:
    head: dict[str, Any] = {}
    base = _base(summary) if not adapter or _on_the_base(summary) else None
    if base:
        head |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    sources = (summary.get("prompts") or {}).values()
    if hub := sorted({p["source"] for p in sources if p["kind"] == "hub" and facts.HUB_ID.fullmatch(p["source"])}):
        head["datasets"] = hub
    head |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    loss = facts.loss(summary)
    head["tags"] = ["spalign", "alignment", "self-priority-alignment", "simpo" if loss == "spa" else loss]
    if adapter:  # PEFT's own
        head["tags"] += [*([f"base_model:adapter:{base}"] if base else []), "lora", "transformers"]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _what(summary: Mapping[str, Any], adapter: bool, other: Mapping[str, Any] | None) -> str:
    n = len(summary["iterations"])
    order = " first, then ".join(f"**{escaped(o)}**" for o in summary["constitution"]["objectives"])
    lora = _lora(summary)
    how = "all weights" if not lora else f"{'a DoRA' if lora.get('dora') else 'a LoRA'} adapter of rank {lora['r']}"
    if lora and lora.get("base_dtype") == "nf4":
        how += " on a base in four bits (NF4)"
    merged = ", merged into the base" if lora and not adapter else ""
    text = (
        f"{escaped(_base_name(summary))} after {n} iteration{'s' * (n > 1)} of Self-Priority Alignment (arXiv 2511.06222) with spalign, "
        f"recipe {escaped(summary['recipe'])}: {order}. The model wrote and refined its own answers; "
        "the judge below, not people, chose between them. "
        f"Trained: {how}{merged}. Fingerprint of the base: {escaped(summary.get('model_fingerprint', 'unknown'))}. "
        "No licence is stated here: the base model's terms apply."
    )
    if other:
        mine = f"that of iteration {n}**" if other["step"] is None else f"the checkpoint of step {other['step']}** of the last iteration"
        text += (
            f"\n\n**This is not the final model but {mine}: the final model failed the priority gate and is not handed over, and this one "
            "is proposed in its place."
        )
    if adapter and not _on_the_base(summary):
        text += f"\n\nThis adapter belongs on the merged model of iteration {n - 1}, not on the base: use the merged model of this run."
    return text


def _of_the_proposed(summary: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """As `_of_the_model`, for the one that is proposed."""
    gate = summary["gate"]
    passed = next(c for c in gate["checkpoints"] if c["passed"])
    kind, of = ("model", f"iteration {other['iteration']}") if other["step"] is None else ("checkpoint", f"step {other['step']}")
    return [
        f"**Priority gate FAILED by the final model**: {escaped(gate['text'])}",
        f"**Priority gate passed by this {kind}, of {of}**: {escaped(passed['text'])}",
        f"**No other score of this {kind} is reported here**; its judged answers are in the run's {facts.answers_of(other)}: "
        "read them before you use it",
        *_of_the_judge(summary),
        *_of_the_guard(summary),
    ]


def _of_the_model(summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before all else; what failed stands in the same form as what went well."""
    lines = []
    if gate := summary.get("gate"):
        result = "passed" if gate["passed"] else "FAILED"
        if not gate["passed"]:
            result += ", and was not enforced" if summary["model_path"] else ": this model is not handed over, do not use it"
            if other := gate.get("proposed"):
                result += f" ({facts.called(other)} is proposed instead)"
        lines.append(f"**Priority gate {result}**: {escaped(gate['text'])}")
    for o in summary["constitution"]["objectives"]:
        by = summary["measures"].get(o, {}).get("all")
        if by is None:
            lines.append(f"**{escaped(o)}: could not be scored**")
            continue
        low, high = by["difference"]["ci"]
        verdict = "rose" if low > 0 else "FELL" if high < 0 else "no change shown"
        lines.append(f"**{escaped(o)}: {verdict}**, {facts.difference(o, by)} on a scale of 0 to 10")
    lines += [*_of_the_judge(summary), *_of_the_guard(summary)]
    for passed, word in ((False, "FAILED"), (True, "passed")):
        if names := [escaped(c["name"]) for c in summary["checks"] if c["passed"] is passed]:
            lines.append(f"**Checks {word}, {len(names)} of {len(summary['checks'])}:** {'; '.join(names)} (figures below)")
    return lines


def _of_the_judge(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"**The judge of {escaped(name)} is {escaped(how['verdict'] or 'not checked')}**: its scores carry no claim by themselves"
        for name, how in summary["judge"]["objectives"].items()
        if how["verdict"] != "trustworthy"
    ]


def _of_the_guard(summary: Mapping[str, Any]) -> list[str]:
    trainings = [iteration["training"] for iteration in summary["iterations"]]
    return [
        f"**Training of iteration {i} was stopped at step {t['steps']}**: {escaped(t['collapsed'])}. "
        f"Its model is that of step {t['steps_kept']}"
        for i, t in enumerate(trainings, 1)
        if t["collapsed"]
    ]


def _load(summary: Mapping[str, Any], adapter: bool) -> str:
    base = _base(summary) if _on_the_base(summary) else None
    base = base if summary["model"] != "demo" else None  # the run took dequantised weights, which are not quite the hub's
    if not adapter:
        return _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "path/to/this/folder"  # or the id of the repository',
            'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        )
    lora = _lora(summary) or {}
    named = base or "path/to/its/base"
    rank = next((r for r in VLLM_RANKS if r >= max(16, int(lora.get("r", 16)))), None)  # 16 is its default
    if lora.get("dora") or rank is None:
        what = "DoRA adapters" if lora.get("dora") else f"ranks above {VLLM_RANKS[-1]}"
        serve = f"vLLM does not serve {what}: merge it first (`spalign merge ADAPTER OUT`)."
    else:
        serve = f"vLLM: `vllm serve {named} --enable-lora --max-lora-rank {rank} --lora-modules spa=ADAPTER`."
    code = _code(
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{named}", dtype="auto")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    )
    return f"{code}\n\n{serve} Into one model: `spalign merge ADAPTER OUT --model BASE`."


def _code(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _limits(summary: Mapping[str, Any], other: Mapping[str, Any] | None) -> list[str]:
    held = (summary.get("prompts") or {}).get("heldout")
    of = f"{held['count']} held-out prompts of one set" if held else "the held-out prompts of one set"
    limits = [
        f"The figures are of {of}, alike in kind to the training prompts; other topics, languages and long conversations are not covered.",
        "Scores are a model's opinion, read beside its AUC above; no person has judged these answers.",
        "One training run with one seed: the intervals are over prompts and do not cover what another seed would give.",
        "Not tested here: jailbreaks and other attacks, knowledge, reasoning, tool use, bias.",
        "Refusals are counted by a pattern of words, which misses some and counts some that are none.",
        "A model that passes these checks can still cause harm; this card is no safety certificate.",
    ]
    if not summary["judge"]["independent"]:
        limits.insert(1, "The model that was trained also judged: a gain may be an answer to its own taste.")
    if summary["model"] == "demo":
        limits.insert(
            0, "A 135M model has almost nothing safe to choose from and judges little better than chance: this shows the machinery only."
        )
    if other:
        tried, kind = len(summary["gate"]["checkpoints"]), "model" if other["step"] is None else "checkpoint"
        limits.insert(0, f"This {kind} was chosen by its figures, in {tried + 1} looks: its bound is a little too good.")
    return limits
