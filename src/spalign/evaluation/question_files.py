"""Files of questions (MT-Bench, MMLU), read like files of prompts: every mistake at once, each with its line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spalign.errors import PromptError
from spalign.prompts import Mistake, read_file, refuse

T = TypeVar("T")


def questions_in(path: Path, read: Callable[[Mapping[str, Any]], T], *, columns: Sequence[str], what: str, needs: str) -> list[T]:
    """What `read` makes of every row; what it raises on says that the row is no `what`, which `needs` certain columns.

    columns: those that a Parquet file is asked for.

    Raises PromptError for a file that cannot be read or holds nothing, and with all mistakes of its rows at once.
    """
    found: list[T] = []
    mistakes: list[Mistake] = []
    for row in read_file(path, columns).rows:
        if isinstance(row, Mistake):
            mistakes.append(row)
            continue
        try:
            found.append(read(row.values))
        except ValueError as e:  # with words of its own, where it has some
            mistakes.append(Mistake(row.where, str(e) or f"not {what}", needs))
        except (KeyError, TypeError, IndexError, AttributeError):
            mistakes.append(Mistake(row.where, f"not {what}", needs))
    if mistakes:
        refuse(mistakes)
    if not found:
        raise PromptError(f"{path}: holds no rows", hint=needs)
    return found


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of them, evenly spread; all where there are no more, or without a limit."""
    return [items[i * len(items) // limit] for i in range(limit)] if limit and limit < len(items) else list(items)
