"""Public prompt sets by their own columns: which hold the prompt, what kind it is, and whether it is ill-meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spalign.config import PromptSource
from spalign.errors import PromptError
from spalign.prompts._read import exists
from spalign.prompts._rows import Mistake, Row, Table
from spalign.text import one_line, shorten
from spalign.types import ILL_MEANT

Values = Mapping[str, Any]
LEGITIMATE = "legitimate"


@dataclass(frozen=True, slots=True)
class PublicSet:
    """hub: (data set, configuration, split) where it is on the hub. prompt: columns that may hold the prompt, the first that is there.

    id, topic: likewise, for what names a row and what it is about; several topics are taken together. context: what the prompt refers to,
    which goes before it. intent: of a row; empty: unknown.
    """

    prompt: tuple[str, ...]
    hub: tuple[str, str | None, str] | None = None
    id: tuple[str, ...] = ()
    topic: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    intent: Callable[[Values], str] = lambda _: ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are looked at."""
        return (*self.prompt, *self.id, *self.topic, *self.context, *_LABELS)


_LABELS = ("label", "prompt_harm_label")


def _ill_meant(_: Values) -> str:
    return ILL_MEANT


def _by(column: str, harmful: str, harmless: str) -> Callable[[Values], str]:
    """Where the label is missing, or another one, nothing is known of the intent."""
    return lambda row: {harmful: ILL_MEANT, harmless: LEGITIMATE}.get(str(row.get(column)).strip().lower(), "")


PUBLIC: dict[str, PublicSet] = {
    "pku_saferlhf": PublicSet(("prompt",), ("PKU-Alignment/PKU-SafeRLHF", None, "train")),  # its labels are of answers
    "wildguard": PublicSet(
        ("prompt",),
        ("allenai/wildguardmix", "wildguardtest", "test"),
        topic=("subcategory",),
        intent=_by("prompt_harm_label", "harmful", "unharmful"),
    ),
    "honeset": PublicSet(("instruction",), topic=("category",)),
    "jailbreaktrigger": PublicSet(("prompt",), topic=("label", "source"), intent=_ill_meant),
    "xstest": PublicSet(("prompt",), ("walledai/XSTest", None, "test"), id=("id",), topic=("type",), intent=_by("label", "unsafe", "safe")),
    "harmbench": PublicSet(
        ("Behavior", "prompt"),
        ("walledai/HarmBench", "standard", "train"),
        id=("BehaviorID",),
        topic=("SemanticCategory", "category"),
        context=("ContextString", "context"),
        intent=_ill_meant,
    ),
    "advbench": PublicSet(("goal", "prompt"), ("walledai/AdvBench", None, "train"), intent=_ill_meant),
}


def named(source: PromptSource) -> PromptSource:
    """A source that is only the name of a public set, as where it is on the hub. Raises PromptError for one that is not there."""
    if source.source not in PUBLIC or exists(Path(source.source)):
        return source
    if "column" in source.model_fields_set:
        raise PromptError(f"the public set '{source.source}' says which column its prompts are in", hint="leave out column")
    name = source.source
    if source.format not in (None, name):
        raise PromptError(f"the source '{name}' is no file of format '{source.format}'", hint="leave out the format, or name a file")
    if (hub := PUBLIC[name].hub) is None:
        raise PromptError(
            f"'{name}' is not on the hub", hint=f"download its file and name it: {{source: FILE.json, format: {name}}} (docs/evaluation.md)"
        )
    given = source.model_fields_set
    own = {
        "subset": source.subset if "subset" in given else hub[1],
        "split": source.split if "split" in given else hub[2],
        "format": name,
        "source": hub[0],
    }
    return source.model_copy(update=own)


def translated(table: Table, name: str) -> Table:
    """A public set's table with the columns that all prompts have: id, prompt, topic, intent. Raises PromptError where it is another's."""
    spec = PUBLIC[name]
    if table.columns and not (set(spec.prompt) & set(table.columns)):
        there = shorten(one_line(", ".join(table.columns)), 300)
        raise PromptError(
            f"{table.head}: no column {' or '.join(map(repr, spec.prompt))}, which '{name}' has (columns: {there})",
            hint="check the file and the format; for a file of your own leave out the format and set column",
        )
    rows = [row if isinstance(row, Mistake) else Row(row.where, _values(row.values, spec)) for row in table.rows]
    return replace(table, columns=("id", "prompt", "topic", "intent"), rows=rows)


def _values(row: Values, spec: PublicSet) -> Values:
    found = next((c for c in spec.prompt if c in row), spec.prompt[0])
    prompt = row.get(found)
    context = next((row[c] for c in spec.context if row.get(c)), None)
    if context is not None and isinstance(prompt, str):
        prompt = f"{context}\n\n---\n\n{prompt}"
    topics = [_text(row[c]) for c in spec.topic if row.get(c) not in (None, "")]
    return {
        "id": next((row[c] for c in spec.id if c in row), None),
        "prompt": prompt,
        "topic": ", ".join(topics),
        "intent": spec.intent(row),
    }


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
