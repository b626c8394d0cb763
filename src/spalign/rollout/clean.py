"""A refined answer is addressed to the user: preambles and talk about "the candidates" are taken off."""

from __future__ import annotations

import re

_ABOUT = r"(?:answers?|responses?|candidates?|versions?|drafts?|replies|reply)"
_PREAMBLE = re.compile(
    rf"""^\s*(?:
        (?:sure|certainly|of\ course|okay|ok|great)[,!.]?\s+(?=here|this)
      | (?:here\ is|here's|this\ is|below\ is)\s[^\n:.]{{0,80}}?(?:{_ABOUT}|one)[^\n:.]{{0,60}}:\s*
      | \**(?:improved|refined|better|revised|final|best|new)\ {_ABOUT}\**\s*:\**\s*
      | (?:assistant|answer|response)\s*:\s*
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_TALK = re.compile(
    rf"""\b(?:
        (?:the|these|those|all|both|previous|other)\s+(?:\w+\s+)?{_ABOUT}\s+(?:above|below|provided|given)
      | (?:candidate|answer|response|draft)\s+(?:\#?\d+|[A-D]\b)
      | (?:this|my|the)\ (?:improved|refined|revised)\ {_ABOUT}
      | (?:better|safer|more\ helpful)\ than\ (?:the\ )?(?:other|previous)\ {_ABOUT}
      | (?:i|i've|i\ have)\ (?:improved|refined|revised|combined)\ (?:the|these|all)
      | scores?\ (?:of\ )?\d+(?:\.\d+)?(?:\s*/\s*10|\ out\ of)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def clean_refined(text: str) -> str:
    """`text` without preamble, wrapping quotes, and sentences about the candidates or their scores; may be empty."""
    before = None
    while before != text:  # "Sure! Here is an improved answer: Answer: ..." is three layers
        before, text = text, _PREAMBLE.sub("", text.strip(), count=1)
    paragraphs = []
    for paragraph in text.split("\n"):
        kept = [s for s in _SENTENCE.split(paragraph) if not _TALK.search(s)]
        paragraphs.append(" ".join(kept))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(paragraphs)).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text
