"""Rows as prompts: every row is checked, and all mistakes of a source are reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from spalign.errors import PromptError
from spalign.text import one_line, printable, shorten
from spalign.types import Message, Prompt

LISTED = 10
"""Mistakes named one by one; the others are counted."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Row:
    """One row and where it stands: `file:line`, or `file: row N` where there are no lines."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mistake:
    where: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Table:
    """A source as it was read: its columns, and its rows in order, with a mistake in place of a row that cannot be read.

    head: where the columns are named.
    """

    source: str
    head: str
    columns: tuple[str, ...]
    rows: Sequence[Row | Mistake]


def prompts_from(table: Table, column: str, max_chars: int) -> list[Prompt]:
    """One prompt a row. Raises PromptError with all mistakes at once, or if there is no row."""
    if table.columns and column not in table.columns:
        unreadable = [row for row in table.rows if isinstance(row, Mistake)]
        refuse([_no_column(table.head, column, table.columns), *unreadable])
    prompts: list[Prompt] = []
    mistakes: list[Mistake] = []
    ids: dict[str, str] = {}
    for number, row in enumerate(table.rows, 1):
        if isinstance(row, Mistake):
            mistakes.append(row)
            continue
        prompt = _prompt(row, number, column, max_chars, mistakes)
        if prompt.id in ids:
            mistakes.append(
                Mistake(row.where, f"id {quoted(prompt.id)} stands twice, first in {ids[prompt.id]}", "give every row its own id")
            )
        ids.setdefault(prompt.id, row.where)
        prompts.append(prompt)
    if mistakes:
        refuse(mistakes)
    if not prompts:
        raise PromptError(f"{table.source}: no prompts in it", hint=f"put at least one row with a '{column}' in it")
    return prompts


def refuse(mistakes: Sequence[Mistake]) -> NoReturn:
    """Raises PromptError with the first mistakes one by one, and the number of the others."""
    shown = mistakes[:LISTED]
    lines = [printable(f"{m.where}: {m.what}") for m in shown]
    if len(mistakes) > 1:
        lines.insert(0, f"{len(mistakes):,} mistakes:")
    if len(mistakes) > LISTED:
        lines.append(f"... and {len(mistakes) - LISTED:,} more")
    raise PromptError("\n".join(lines), hint="; ".join(dict.fromkeys(m.fix for m in shown)))


def quoted(text: str) -> str:
    """A user's text, safe and short enough for an error message."""
    return f"'{shorten(one_line(printable(text)), 80)}'"


def _prompt(row: Row, number: int, column: str, max_chars: int, mistakes: list[Mistake]) -> Prompt:
    """The row as a prompt; what is wrong with it is added to `mistakes`."""
    return Prompt(
        id=_label(row, "id", mistakes) or f"row-{number:05d}",
        messages=_messages(row, column, max_chars, mistakes),
        topic=_label(row, "topic", mistakes),
        intent=_label(row, "intent", mistakes),
    )


def _label(row: Row, name: str, mistakes: list[Mistake]) -> str:
    """An optional text of the row; a whole number is taken as its digits, and nothing as ''."""
    value = row.values.get(name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        mistakes.append(Mistake(row.where, f"'{name}' is {_kind(value)}, not text", f"write the {name} as text, or leave it out"))
        return ""
    _check_encodable(value, f"'{name}'", row.where, mistakes)
    return value


def _messages(row: Row, column: str, max_chars: int, mistakes: list[Mistake]) -> tuple[Message, ...]:
    """The row's conversation; `()` if it cannot be used."""
    if column not in row.values:
        mistakes.append(_no_column(row.where, column, tuple(row.values)))
        return ()
    turns = row.values[column]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    elif not isinstance(turns, list):
        fix = "write text, or a list of {role, content} turns"
        mistakes.append(Mistake(row.where, f"'{column}' is {_kind(turns)}, not text or a list of turns", fix))
        return ()
    problem = _wrong_turns(turns)
    if problem:
        mistakes.append(Mistake(row.where, *problem))
        return ()
    length = sum(len(turn["content"]) for turn in turns)
    if length > max_chars:
        what = f"the prompt is {length:,} characters long, over the limit of {max_chars:,}"
        mistakes.append(Mistake(row.where, what, "shorten it, or raise prompts.max_chars"))
    for turn in turns:
        _check_encodable(turn["content"], f"'{column}'", row.where, mistakes)
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def _wrong_turns(turns: list[Any]) -> tuple[str, str] | None:
    """What is wrong with a conversation, and what to do; None if nothing is."""
    for number, turn in enumerate(turns, 1):
        if problem := _wrong_turn(turn, number, alone=len(turns) == 1):
            return problem
    if not turns:
        return "the prompt has no turns", "add a user turn, or remove the row"
    if turns[-1]["role"] != "user":
        return f"the last turn is the {turns[-1]['role']}'s, not the user's", "end the conversation with a user turn; the model answers it"
    return None


def _wrong_turn(turn: Any, number: int, *, alone: bool) -> tuple[str, str] | None:
    shape = 'write each turn as {"role": "user", "content": "..."}'
    if not isinstance(turn, Mapping):
        return f"turn {number} is {_kind(turn)}, not a {{role, content}} object", shape
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            return f"turn {number} has no {key}" if turn.get(
                key
            ) is None else f"turn {number}: its {key} is {_kind(turn[key])}, not text", shape
    role = cast("str", turn["role"])
    if role not in ROLES:
        return f"turn {number} has the unknown role {quoted(role)}", f"use one of: {', '.join(ROLES)}"
    if role == "system" and number > 1:
        return f"turn {number} is a system turn after others", "put the system turn first, and only one"
    if not turn["content"].strip():
        return "the prompt is empty" if alone else f"turn {number} is empty", "write a text, or remove the row"
    return None


def _no_column(where: str, column: str, columns: Sequence[str]) -> Mistake:
    close = difflib.get_close_matches(column, columns, n=1)
    there = shorten(", ".join(one_line(c) for c in columns), 300) or "none"
    what = f"no column '{column}'" + (f"; did you mean {quoted(close[0])}?" if close else "") + f" (columns: {there})"
    return Mistake(where, what, "set the source's `column` to the one that holds the prompts, or rename it in the file")


def _check_encodable(text: str, name: str, where: str, mistakes: list[Mistake]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        what = f"{name} holds half of a surrogate pair (\\u{ord(text[e.start]):04x}) at character {e.start + 1:,}"
        mistakes.append(Mistake(where, what, "write the whole character; this one is no text"))


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a decimal number",
        list: "a list",
        dict: "an object",
        str: "text",
    }
    return names.get(type(value), type(value).__name__)
