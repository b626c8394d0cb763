"""The questions of MT-Bench: two turns each, and reference answers where there are some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import MTBenchConfig
from spalign.evaluation.question_files import questions_in, spread
from spalign.prompts import quoted
from spalign.types import Message, Prompt

Both = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """first: the first turn as a prompt; second: the user's second turn; references: to both, empty where there is none."""

    first: Prompt
    second: str
    references: Both

    def after(self, answer: str) -> Prompt:
        """The second turn as a prompt, when the first was answered so."""
        turns = (*self.first.messages, Message("assistant", answer), Message("user", self.second))
        return Prompt(f"{self.first.id}-2", turns, topic=self.first.topic)


def load_questions(config: MTBenchConfig) -> list[Question]:
    """Raises PromptError with all mistakes at once."""
    references: dict[Any, Both] = {}
    if config.references:
        needs = "each row needs question_id and choices[0].turns (two texts)"
        references = dict(
            questions_in(
                Path(config.references), _reference, columns=("question_id", "choices"), what="a reference of MT-Bench", needs=needs
            )
        )
    seen = set[Any]()

    def question(row: Mapping[str, Any]) -> Question:
        name, (first, second) = row["question_id"], _two(row["turns"])
        if name in seen:
            raise ValueError(f"question_id {quoted(str(name))} stands there twice")
        seen.add(name)
        own = _two(row["reference"]) if row.get("reference") else ("", "")
        prompt = Prompt(f"mt-{name}", (Message("user", first),), topic=str(row.get("category", "")))
        return Question(prompt, second, references.get(name, own))

    needs = "each row needs question_id and turns (two texts)"
    columns = ("question_id", "category", "turns", "reference")
    return spread(questions_in(Path(config.source), question, columns=columns, what="a question of MT-Bench", needs=needs), config.limit)


def _reference(row: Mapping[str, Any]) -> tuple[Any, Both]:
    name = row["question_id"]
    hash(name)  # a list is none
    return name, _two(row["choices"][0]["turns"])


def _two(texts: Any) -> Both:
    """The first two texts. Raises TypeError where there are none."""
    if not (isinstance(texts, list) and len(texts) > 1 and all(isinstance(t, str) for t in texts[:2])):
        raise TypeError
    return texts[0], texts[1]
