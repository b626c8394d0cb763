"""From preference rows to groups: a prompt with its distinct responses and the pairs between them.

A response that stands in ten pairs needs one forward pass, not ten.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spalign.errors import DataError

logger = logging.getLogger(__name__)

Encode = Callable[[Any], list[int]]


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """chosen, rejected: indices into the group's responses. gap: Delta_i of Eq. 3, in score points (1 where the data has none).

    weight, margin: of this pair, in place of Eq. 3's weight and of gamma, where the data gives them.
    """

    chosen: int
    rejected: int
    gap: float
    weight: float | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """prompt: token ids, template and BOS included. responses: distinct token ids, EOS included. name: for messages.

    references: summed log-probability of each response under the reference policy (DPO), nats.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    pairs: tuple[TrainingPair, ...]
    name: str = ""
    references: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.responses)
        if (
            not self.prompt
            or not self.pairs
            or not all(self.responses)
            or any(not (0 <= i < n) for p in self.pairs for i in (p.chosen, p.rejected))
        ):
            raise DataError(
                f"group {self.name}: an empty prompt or response, no pairs, or a pair that names no response",
                hint="build groups with group_rows, which drops and counts such rows",
            )


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One preference row as token ids."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    gap: float | None
    name: str
    weight: float | None = None
    margin: float | None = None


def group_rows(rows: Iterable[EncodedRow], *, max_length: int, needs_gap: bool) -> tuple[list[TrainingGroup], Counter[str]]:
    """Groups in order of first appearance, and how many rows were dropped for which reason.

    Dropped and counted: empty completions, rows longer than `max_length` tokens, identical sides, repeated pairs (the first stays), numbers
    that are negative or not finite. Raises DataError where a gap is needed (spa, alpha > 0) and a row has none.
    """
    dropped: Counter[str] = Counter()
    by_prompt: dict[tuple[int, ...], tuple[dict[tuple[int, ...], int], dict[tuple[int, int], TrainingPair], str]] = {}
    for row in rows:
        if needs_gap and row.gap is None:
            raise DataError(
                f"row {row.name} has no gap",
                hint="give 'gap' (|difference of the summed scores|, >= 0) in every row, or name a weight_column, or set alpha to 0",
            )
        if any(x is not None and not 0 <= x < math.inf for x in (row.gap, row.weight, row.margin)):
            dropped["gap, weight or margin negative or not finite"] += 1
        elif not row.prompt or not row.chosen or not row.rejected:
            dropped["empty"] += 1
        elif row.chosen == row.rejected:
            dropped["identical sides"] += 1
        elif len(row.prompt) + max(len(row.chosen), len(row.rejected)) > max_length:
            dropped["too long"] += 1
        else:
            responses, pairs, _ = by_prompt.setdefault(row.prompt, ({}, {}, row.name))
            c, r = (responses.setdefault(ids, len(responses)) for ids in (row.chosen, row.rejected))
            if (c, r) in pairs:
                dropped["repeated"] += 1
            else:
                pairs[(c, r)] = TrainingPair(c, r, 1.0 if row.gap is None else row.gap, row.weight, row.margin)
    if dropped:
        logger.warning("spalign: dropped rows: %s", ", ".join(f"{n} {why}" for why, n in sorted(dropped.items())))
    groups = [
        TrainingGroup(prompt, tuple(responses), tuple(pairs.values()), name) for prompt, (responses, pairs, name) in by_prompt.items()
    ]
    return groups, dropped


def encode_row(
    row: Mapping[str, Any],
    index: int,
    *,
    chat: Encode,
    answer: Encode,
    plain: Encode,
    weight_column: str | None = None,
    margin_column: str | None = None,
) -> EncodedRow:
    """A row of TRL's preference format as token ids.

    `prompt`/`chosen`/`rejected` are lists of {role, content} turns (conversational; a completion's turns are the assistant's) or plain
    strings. Where the row has `prompt_ids`, `chosen_ids`, `rejected_ids`, those are taken as they are: what was generated is what is
    trained on. `gap` is optional; columns that are named for weights and margins must be there.
    """
    name = str(row.get("id") or index)
    try:
        prompt = row.get("prompt_ids")
        if prompt is None:
            prompt = chat(row["prompt"]) if isinstance(row["prompt"], list) else plain(row["prompt"])
        sides = [
            ids if (ids := row.get(f"{side}_ids")) is not None else _completion(row[side], answer, name) for side in ("chosen", "rejected")
        ]
    except KeyError as e:
        raise DataError(f"row {name} has no column {e}", hint="rows need prompt, chosen and rejected (TRL's preference format)") from None
    numbers = [_number(row, column, name, needed) for column, needed in (("gap", False), (weight_column, True), (margin_column, True))]
    return EncodedRow(tuple(prompt), tuple(sides[0]), tuple(sides[1]), numbers[0], name, numbers[1], numbers[2])


def _number(row: Mapping[str, Any], column: str | None, name: str, needed: bool) -> float | None:
    if column is None:
        return None
    value = row.get(column)
    if value is None and not needed:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"row {name}: {column} is {value!r}", hint="give a number >= 0 in every row, or leave the column out") from None


def _completion(value: Any, answer: Encode, name: str) -> list[int]:
    if isinstance(value, str):
        return answer(value) if value else []
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role") == "assistant":
        return answer(value[0]["content"]) if value[0]["content"] else []
    raise DataError(f"row {name}: a completion must be a string or one assistant turn", hint="put earlier turns into the prompt")
