"""From preference rows to groups: a prompt with its distinct responses and the pairs between them.

A response that stands in ten pairs needs one forward pass, not ten.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from spalign.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """chosen, rejected: indices into the group's responses. gap: Delta_i of Eq. 3, in score points (1 where the data has none).

    weight, margin: of this pair, in place of Eq. 3's weight and of gamma, where the arguments name a column for them. name: of its row,
    for messages.
    """

    chosen: int
    rejected: int
    gap: float
    weight: float | None = None
    margin: float | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if any(x is not None and not 0 <= x < math.inf for x in (self.gap, self.weight, self.margin)):
            raise DataError(f"pair {self.name}: gap, weight or margin is negative or not finite", hint="leave it out")


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
    that are negative or not finite (a gap only where it is needed). Raises DataError where it is needed (spa, alpha > 0) and is not there.
    """
    dropped: Counter[str] = Counter()
    by_prompt: dict[tuple[int, ...], tuple[dict[tuple[int, ...], int], dict[tuple[int, int], TrainingPair], str]] = {}
    for row in rows:
        if needs_gap and row.gap is None:
            raise DataError(
                f"row {row.name} has no gap",
                hint="give 'gap' (|difference of the summed scores|, >= 0) in every row, or name a weight_column, or set alpha to 0",
            )
        gap = row.gap if needs_gap and row.gap is not None else 1.0
        if any(x is not None and not 0 <= x < math.inf for x in (gap, row.weight, row.margin)):
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
                pairs[(c, r)] = TrainingPair(c, r, gap, row.weight, row.margin, row.name)
    if dropped:
        logger.warning("spalign: dropped rows: %s", ", ".join(f"{n} {why}" for why, n in sorted(dropped.items())))
    groups = [
        TrainingGroup(prompt, tuple(responses), tuple(pairs.values()), name) for prompt, (responses, pairs, name) in by_prompt.items()
    ]
    return groups, dropped
