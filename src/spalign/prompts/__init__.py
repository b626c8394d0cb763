"""The prompts a run starts from: a shipped set, a file, or a Hugging Face data set; checked before any model is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from spalign.config import PromptsConfig, PromptSource
from spalign.errors import PromptError
from spalign.prompts._public import PUBLIC, named, translated
from spalign.prompts._read import exists, read_file, read_hub
from spalign.prompts._rows import Mistake, Table, prompts_from, quoted, refuse
from spalign.text import words
from spalign.types import Message, Prompt

__all__ = [
    "Mistake",
    "check_disjoint",
    "exists",
    "load_prompts",
    "named",
    "quoted",
    "read_file",
    "refuse",
    "sha256",
    "shipped_sets",
]


def shipped_sets() -> tuple[str, ...]:
    """Names of the prompt sets in the package."""
    folder = files("spalign").joinpath("prompts")
    return tuple(sorted(f.name.removesuffix(".jsonl") for f in folder.iterdir() if f.name.endswith(".jsonl")))


def load_prompts(source: PromptSource, config: PromptsConfig, *, note: Callable[[str], None] = lambda _: None) -> list[Prompt]:
    """The prompts of `source` in its order: all of them or `source.limit`, each with `config.suffix` on its last turn.

    note: told how many repeated prompts of a public set were left out. Raises PromptError for a source that cannot be read, and with all
    mistakes of its rows at once.
    """
    source = named(source)
    prompts = prompts_from(_table(source), source.column, config.max_chars)
    if source.format:
        once = {_normal(p): p for p in reversed(prompts)}
        kept = [p for p in prompts if once[_normal(p)] is p]
        if left := len(prompts) - len(kept):
            note(f"{source.source}: {left:,} prompts that repeat an earlier one are left out")
        prompts = kept
    if source.limit is not None:
        prompts = _spread(prompts, source.limit, source.source)
    return [_with_suffix(p, config.suffix) for p in prompts]


def check_disjoint(train: Iterable[Prompt], heldout: Iterable[Prompt]) -> None:
    """Raises PromptError if a training prompt, apart from case and punctuation, stands in the held-out set."""
    held = {_normal(p): p for p in heldout}
    shared = [(p, held[_normal(p)]) for p in train if _normal(p) in held]
    if shared:
        refuse(
            [
                Mistake(
                    "prompts", f"the training prompt {quoted(a.id)} is the held-out prompt {quoted(b.id)}", "remove it from one of the sets"
                )
                for a, b in shared
            ]
        )


def sha256(prompts: Sequence[Prompt]) -> str:
    """Fingerprint of the prompts in their order: ids, messages, topics and intents."""
    rows = [[p.id, [[m.role, m.content] for m in p.messages], p.topic, p.intent] for p in prompts]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _table(source: PromptSource) -> Table:
    """The rows of the source; raises PromptError where there is no such source."""
    if source.format:
        return translated(_read(source, PUBLIC[source.format].columns), source.format)
    return _read(source, (source.column,))


def _read(source: PromptSource, wanted: Sequence[str]) -> Table:
    name = source.source
    path = Path(name)
    if name in shipped_sets():
        return read_file(Path(str(files("spalign").joinpath("prompts", f"{name}.jsonl"))), wanted)
    stands = bool(name.strip()) and exists(path)
    hub_name = name.count("/") == 1 and all(name.split("/")) and "." not in name
    if path.is_dir() if stands else hub_name:
        return read_hub(source, wanted)
    if stands or path.suffix or "/" in name:
        return read_file(path, wanted)
    close = difflib.get_close_matches(name, (*shipped_sets(), *PUBLIC), n=1)
    raise PromptError(
        f"no prompts {quoted(name)}" + (f"; did you mean '{close[0]}'?" if close else ""),
        hint=f"name a shipped set ({', '.join(shipped_sets())}), a public one ({', '.join(PUBLIC)}), "
        "a .jsonl, .json, .csv or .parquet file, or a hub data set as org/name",
    )


def _spread(prompts: list[Prompt], limit: int, source: str) -> list[Prompt]:
    """`limit` prompts spread evenly over (intent, topic), in their original order; raises PromptError if there are fewer."""
    total = len(prompts)
    if limit > total:
        raise PromptError(f"{source}: limit {limit:,} is more than the {total:,} prompts there are", hint=f"set limit to {total} or less")
    order = sorted(range(total), key=lambda i: (prompts[i].intent, prompts[i].topic, i))
    # floor((i + 0.5) * total / limit) in integers: the middle of each of `limit` equal slices
    kept = sorted(order[(2 * i + 1) * total // (2 * limit)] for i in range(limit))
    return [prompts[i] for i in kept]


def _with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    if not suffix.strip():
        return prompt
    *earlier, last = prompt.messages
    asked = Message(last.role, f"{last.content.rstrip()} {suffix.strip()}")
    return dataclasses.replace(prompt, messages=(*earlier, asked))


def _normal(prompt: Prompt) -> tuple[str, ...]:
    """What two prompts are compared by: their words, or the text itself where it has no word (`???`)."""
    return tuple(words(prompt.text)) or (prompt.text.strip(),)
