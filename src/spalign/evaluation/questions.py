"""What a judge is asked, in files with a version each, and what its replies say."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Literal

SCORE, PAIRWISE, QUALITY = "score-1", "pairwise-1", "quality-1"
"""The versions in use; their names and texts go into every result."""
Verdict = Literal["A", "B", "tie"]

_SCORE = re.compile(r"\bscore\b(?:\s*\([^)\n]{0,20}\))?[*_]*\s*:", re.IGNORECASE)
_VERDICT = re.compile(r"\bverdict\b[*_]*\s*:", re.IGNORECASE)
_A_SCORE = re.compile(r"[\s*_]*(\d{1,2})(?:\s*(?:/|out of)\s*10)?[\s*_.]*", re.IGNORECASE)
_A_VERDICT = re.compile(r"[\s*_]*(a|b|tie)[\s*_.]*", re.IGNORECASE)


def text_of(name: str) -> str:
    """The question as it stands in its file."""
    return files("spalign.evaluation").joinpath("questions", f"{name}.md").read_text(encoding="utf-8")


def fingerprint(name: str) -> str:
    return hashlib.sha256(text_of(name).encode()).hexdigest()


def question(name: str, *, prompt: str, answer: str, other: str = "", objective: str = "", principle: str = "") -> str:
    """The question about `answer`. Prompt and answers are hostile: they stand between tags that none of them can have foreseen."""
    mark = hashlib.sha256("\x1f".join((prompt, answer, other)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return text_of(name).format(mark=mark, name=objective, principle=principle, prompt=prompt, answer=answer, other=other)


def parse_score(reply: str) -> float | None:
    """The integer 1..10 after the reply's last `Score:`, to the end of its line; None, never a guess, where anything else stands there."""
    found = _A_SCORE.fullmatch(_said(_SCORE, reply))
    return float(found[1]) if found and 1 <= int(found[1]) <= 10 else None


def parse_verdict(reply: str) -> Verdict | None:
    """What stands after the reply's last `Verdict:`, to the end of its line; None where that is none."""
    found = _A_VERDICT.fullmatch(_said(_VERDICT, reply))
    return {"a": "A", "b": "B", "tie": "tie"}[found[1].lower()] if found else None  # type: ignore[return-value]


def _said(word: re.Pattern[str], reply: str) -> str:
    ends = [match.end() for match in word.finditer(reply)]
    return reply[ends[-1] :].split("\n", 1)[0] if ends else ""


def settled(first: Verdict | None, swapped: Verdict | None) -> float | None:
    """What both orders say together of the first answer: 1 won, 0 lost, 0.5 a tie or a verdict that flips with the order; None: unparsed.

    first: the verdict with the first answer as A; swapped: with it as B.
    """
    if first is None or swapped is None:
        return None
    back: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie"}
    same = first if first == back[swapped] else "tie"
    return {"A": 1.0, "B": 0.0, "tie": 0.5}[same]
