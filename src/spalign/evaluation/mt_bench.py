"""The questions of MT-Bench: two turns each, and reference answers where there are some."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from spalign.config import MTBenchConfig
from spalign.errors import PromptError
from spalign.types import Message, Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """first: the first turn as a prompt; second: the user's second turn; references: to both, empty where there is none."""

    first: Prompt
    second: str
    references: tuple[str, str]

    def after(self, answer: str) -> Prompt:
        """The second turn as a prompt, when the first was answered so."""
        turns = (*self.first.messages, Message("assistant", answer), Message("user", self.second))
        return Prompt(f"{self.first.id}-2", turns, topic=self.first.topic)


def load_questions(config: MTBenchConfig) -> list[Question]:
    """Raises PromptError with the first mistake's line."""
    references: dict[Any, tuple[str, str]] = {}
    if config.references:
        for _, row in _rows(Path(config.references), "question_id and choices[0].turns", lambda r: r["choices"][0]["turns"][1]):
            one, two = row["choices"][0]["turns"][:2]
            references[row["question_id"]] = (one, two)
    out, seen = [], set[Any]()
    for n, row in _rows(Path(config.source), "question_id and turns (two texts)", lambda r: [turn.strip() for turn in r["turns"][:2]][1]):
        first, second = row["turns"][:2]
        name, given = row.get("question_id", n), row.get("reference")
        if name in seen:
            raise PromptError(f"{config.source}:{n}: question_id {name} stands there twice", hint="give each question an id of its own")
        seen.add(name)
        own = (str(given[0]), str(given[1])) if isinstance(given, list) and len(given) > 1 else ("", "")
        prompt = Prompt(f"mt-{name}", (Message("user", first),), topic=str(row.get("category", "")))
        out.append(Question(prompt, second, references.get(name, own)))
    return spread(out, config.limit) if config.limit else out


def spread(items: Sequence[T], limit: int) -> list[T]:
    """`limit` of them, evenly spread; all where there are no more."""
    return [items[i * len(items) // limit] for i in range(limit)] if limit < len(items) else list(items)


def _rows(path: Path, wanted: str, has: Callable[[Any], Any]) -> list[tuple[int, dict[str, Any]]]:
    """The file's rows with their lines."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at what JSON may hold
    except (OSError, UnicodeDecodeError) as e:
        raise PromptError(f"{path}: cannot be read: {e}", hint="check the path; the file is JSONL in UTF-8") from e
    out = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                has(row)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                raise PromptError(f"{path}:{n}: not a row of MT-Bench", hint=f"each line needs {wanted}") from None
            out.append((n, row))
    if not out:
        raise PromptError(f"{path}: holds no rows", hint=f"each line needs {wanted}")
    return out
