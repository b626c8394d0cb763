"""What a judge is asked, in files with a version each, and what its replies say."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Literal

SCORE, PAIRWISE, QUALITY = "score-1", "pairwise-1", "quality-1"
"""The versions in use; their names and texts go into every result."""
Verdict = Literal["A", "B", "tie"]

_SCORE = re.compile(r"\bscore\W{1,8}(\d{1,4})(?!\w|[.,]\d)(?:\s*(?:/|out of)\s*(\d{1,4}))?", re.IGNORECASE)
_VERDICT = re.compile(r"\bverdict\W{1,8}(a|b|tie)\b", re.IGNORECASE)


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
    """The integer 1..10 of the reply's last `Score:`; None, never a guess, where there is none or it is another number."""
    found = list(_SCORE.finditer(reply))
    if not found:
        return None
    value, outs = int(found[-1][1]), found[-1][2]
    return float(value) if 1 <= value <= 10 and outs in (None, "10") else None


def parse_verdict(reply: str) -> Verdict | None:
    """The reply's last `Verdict:`; None where there is none."""
    found = _VERDICT.findall(reply)
    return {"a": "A", "b": "B", "tie": "tie"}[found[-1].lower()] if found else None  # type: ignore[return-value]


def settled(first: Verdict | None, swapped: Verdict | None) -> float | None:
    """What both orders say together of the first answer: 1 won, 0 lost, 0.5 a tie or a verdict that flips with the order; None: unparsed.

    first: the verdict with the first answer as A; swapped: with it as B.
    """
    if first is None or swapped is None:
        return None
    back: dict[Verdict, Verdict] = {"A": "B", "B": "A", "tie": "tie"}
    same = first if first == back[swapped] else "tie"
    return {"A": 1.0, "B": 0.0, "tie": 0.5}[same]
