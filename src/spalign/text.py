"""Text that came from a model or a user is hostile: make it safe to print, to compare and to put on one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

_KEYS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_WORD = re.compile(r"\w+", re.UNICODE)


def printable(text: str) -> str:
    """`text` without control, format and private characters, so that it cannot drive a terminal; newlines and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    """`text` on one line: a response cannot forge a line such as "Answer: Yes" in a judge's prompt."""
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """Lower-case words, punctuation left out."""
    return _WORD.findall(text.lower())


def shorten(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def without_keys(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the values of environment variables that are named like keys: what others print may hold them."""
    for name, value in environment.items():
        if _KEYS.search(name) and len(value.strip()) >= 8:
            text = text.replace(value.strip(), "[" + name + "]")
    return text
