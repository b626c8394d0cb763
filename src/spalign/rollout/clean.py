"""A refined answer is addressed to the user: preambles and talk about "the candidates" are taken off."""

from __future__ import annotations

import re

_ABOUT = r"(?:answers?|responses?|candidates?|versions?|drafts?|replies|reply)"
_PREAMBLE = re.compile(
    rf"""^\s*(?:(?:sure|certainly|of\ course|okay|ok|great)[,!.]?\s+)?(?:
        (?:here\ is|here['’]s|this\ is|below\ is)\s(?!how\b|what\b)[^\n:.]{{0,80}}?\b(?:{_ABOUT}\b[^\n:.]{{0,60}}|one\s*):\s*
      | \**(?:improved|refined|better|revised|final|best|new)\ {_ABOUT}\**\s*:\**\s*
      | (?:assistant|answer|response)\s*:\s*
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_RATED = rf"""(?:it|they|this(?:\ one)?|(?:this|that|the|these|those|both|all|each|my)\ (?:\w+\ )?{_ABOUT})
    (?:\ (?:would|will|also|only))*
    (?:,?\ (?:has|have|had|gets?|got|receives?|received|deserves?|with)(?:\ (?:an?|the))?
       (?:\ (?:overall|total|final|high|higher|perfect|harmlessness|helpfulness|honesty|safety))?)?"""
"""What stands before "score of 9/10" in a comment on a candidate; a pain score of 7/10 is none."""
_TALK = re.compile(
    rf"""\b(?:
        (?:the|these|those|all|both|previous|other)\s+(?:\w+\s+)?{_ABOUT}\s+(?:above|below|provided|given)
      | (?:candidate|answer|response|draft)\s+(?:\#?\d+\b|(?-i:[A-D])\b)
      | (?:this|my|the)\ (?:improved|refined|revised)\ {_ABOUT}
      | (?:better|safer|more\ helpful)\ than\ (?:the\ )?(?:other|previous)\ {_ABOUT}
      | (?:i|i['’]ve|i\ have)\ (?:improved|refined|revised|combined)\ (?:the|these|all)
      | (?<!\bif\ )(?<!\bwhen\ ){_RATED}\ scores?(?:\ of)?\ \d+(?:\.\d+)?(?:\s*/\s*|\ out\ of\ )10\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def clean_refined(text: str) -> str:
    """`text` without preamble, wrapping quotes, and sentences about the candidates or their scores; may be empty."""
    before = None
    while before != text:  # layers hide layers: 'Sure! Here is an improved answer: "Answer: ..."'
        before, text = text, _peeled(text)
    return text


def _peeled(text: str) -> str:
    text = _PREAMBLE.sub("", text.strip(), count=1)
    if _TALK.search(text):  # otherwise the model's own spacing stays
        paragraphs = [" ".join(s for s in _SENTENCE.split(paragraph) if not _TALK.search(s)) for paragraph in text.split("\n")]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(paragraphs)).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    return text
