"""Objectives for constitutions of tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def plain_objectives(names: Iterable[str]) -> list[dict[str, Any]]:
    exemplars = [{"prompt": "p", "response": "r", "answer": a} for a in ("yes", "no")]
    return [
        {
            "name": o,
            "principle": f"Be {o}.",
            "question": f"Is {o} good?",
            "good_answer": "yes",
            "exemplars": exemplars,
            "good_system": "good",
            "bad_system": "bad",
        }
        for o in names
    ]
