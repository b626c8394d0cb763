"""`report.html`: one file without a network. Everything a model or a user wrote is data in it, shown as text, and nothing of it can run."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from spalign.text import printable

CHUNK = 100
"""Prompts a block of texts; a block is read when one of them is looked at."""


def page_of(data: Mapping[str, Any], details: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """The page, piece by piece. data: what it shows at once, `prompts` (a line each) among it. details: of every prompt, in their order."""
    folder = files("spalign.report").joinpath("page")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    allowed = [f"style-src '{_hash(style)}'", f"script-src '{_hash(script)}'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    policy = "; ".join(["default-src 'none'", *allowed])
    title, about = (escape(printable(str(data[key]))) for key in ("name", "about"))
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}: spalign</title>\n<style>{style}</style>\n</head>\n<body>\n'
        f'<h1>{title}</h1>\n<p class="dim">{about}</p>\n<main id="main"></main>\n'
        "<noscript><p>This report shows its data by a script of its own; nothing is loaded from elsewhere.</p></noscript>\n"
    )
    yield _block("data", {**data, "chunk": CHUNK})
    held: list[Mapping[str, Any]] = []
    number = 0
    for one in details:
        held.append(one)
        if len(held) == CHUNK:
            yield _block(f"chunk-{number}", held)
            held, number = [], number + 1
    if held:
        yield _block(f"chunk-{number}", held)
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _block(name: str, value: Any) -> str:
    """A block of data: JSON without a character that could end it, nor one that drives a terminal or turns the direction of text."""
    text = json.dumps(_safe(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _safe(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float) and not math.isfinite(value):  # which JSON does not know
        return None
    if isinstance(value, Mapping):
        return {printable(str(k)): _safe(v) for k, v in value.items()}
    return [_safe(v) for v in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
