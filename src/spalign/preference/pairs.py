"""Preference pairs (SPA, Eq. 2), the choice among them, and their weights (Eq. 3)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from spalign.config import PairsConfig
from spalign.constitution import Objective
from spalign.errors import DataError
from spalign.preference.denoise import usable
from spalign.preference.order import SLACK, levels
from spalign.types import PreferencePair, Prompt, PromptGroup, Response


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs kept, a list a group; how many went by the cap a prompt (capped) and by the balance of lengths (unbalanced)."""

    pairs: list[list[PreferencePair]]
    capped: int
    unbalanced: int


def make_pairs(group: PromptGroup, objectives: Sequence[Objective], config: PairsConfig) -> list[PreferencePair]:
    """All (x, y, y-) of Eq. 2 over Y = usable candidates + refined: y lexicographically greater, margin at least delta.

    G is the level (spalign.preference.order), so margin and gap are in score points. Of responses with the same tokens the
    first by id stands. Greatest margin first.
    """
    distinct: dict[tuple[int, ...], Response] = {}
    for response in sorted(usable((*group.candidates, group.refined), objectives), key=lambda r: r.id):
        distinct.setdefault(response.token_ids, response)
    pairs = (_pair(group.prompt, chosen, rejected, objectives) for chosen, rejected in permutations(distinct.values(), 2))
    return sorted((p for p in pairs if p and p.margin >= config.delta - SLACK), key=_rank)


def _pair(prompt: Prompt, chosen: Response, rejected: Response, objectives: Sequence[Objective]) -> PreferencePair | None:
    """The pair, or None where `chosen` is not lexicographically greater."""
    up, down = levels(chosen, objectives), levels(rejected, objectives)
    if up <= down:
        return None
    differences = [a - b for a, b in zip(up, down, strict=True)]
    gap = abs(math.fsum(differences))
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=math.fsum(map(abs, differences)),
        gap=gap if gap > SLACK else 0.0,
        decided_by=next(o.name for o, d in zip(objectives, differences, strict=True) if d),
    )


def select_pairs(pairs_by_group: Sequence[Sequence[PreferencePair]], config: PairsConfig) -> Selection:
    """At most `max_per_prompt` pairs a group; with `balance_length`, as many shorter winners as longer ones over the run.

    Groups stay in order, pairs go by margin. No group loses its last pair: length never drops a prompt.
    """
    capped = [_capped(pairs, config.max_per_prompt, config.balance_length) for pairs in pairs_by_group]
    kept = _balanced(capped) if config.balance_length else capped
    given, after_cap, after_balance = (sum(map(len, groups)) for groups in (pairs_by_group, capped, kept))
    return Selection(kept, capped=given - after_cap, unbalanced=after_cap - after_balance)


def weights(gaps: Sequence[float], alpha: float) -> list[float]:
    """w_i = (Delta_i / mean Delta)^alpha of Eq. 3, for one batch of gaps in score points; alpha = 0 (plain SimPO) gives 1.0."""
    if wrong := [g for g in gaps if not (math.isfinite(g) and g >= 0)]:
        raise DataError(f"a pair's gap is {wrong[0]}", hint="gaps are finite and not negative; make the pairs again with make_pairs()")
    if alpha == 0 or not gaps:
        return [1.0] * len(gaps)
    mean = math.fsum(gaps) / len(gaps)
    if mean == 0:
        raise DataError(
            f"all {len(gaps)} pairs of the batch have gap 0: their objectives cancel, and the weights of Eq. 3 are 0/0",
            hint="set train.alpha=0 (plain SimPO), or put more prompts into a step (train.prompts_per_step)",
        )
    return [float((gap / mean) ** alpha) for gap in gaps]


def _rank(pair: PreferencePair) -> tuple[float, str, str, str]:
    """Greatest margin first, then by ids."""
    return -pair.margin, pair.prompt.id, pair.chosen.id, pair.rejected.id


def _longer(pair: PreferencePair) -> int:
    """1: the winner has more tokens than the loser; -1: fewer; 0: as many."""
    won, lost = len(pair.chosen.token_ids), len(pair.rejected.token_ids)
    return (won > lost) - (won < lost)


def _capped(pairs: Sequence[PreferencePair], most: int | None, balance: bool) -> list[PreferencePair]:
    """The best `most` pairs; with balance, shorter and longer winners take turns and equal ones stand in for the kind that lacks."""
    ranked = sorted(pairs, key=_rank)
    if most is None or len(ranked) <= most:
        return ranked
    if not balance:
        return ranked[:most]
    queues = {kind: deque(p for p in ranked if _longer(p) == kind) for kind in (-1, 0, 1)}
    turn = next((kind for kind in map(_longer, ranked) if kind), 1)  # the kind with the greatest margin begins
    taken = []
    for _ in range(most):
        taken.append((queues[turn] or queues[0] or queues[-turn]).popleft())
        turn = -turn
    return sorted(taken, key=_rank)


def _balanced(groups: Sequence[Sequence[PreferencePair]]) -> list[list[PreferencePair]]:
    """Without the least margins of the more frequent kind, until both kinds are equally frequent or only last pairs remain."""
    excess = sum(_longer(p) for pairs in groups for p in pairs)
    frequent = 1 if excess > 0 else -1
    places = [(_rank(p), g, i) for g, pairs in enumerate(groups) for i, p in enumerate(pairs) if _longer(p) == frequent]
    left = [len(pairs) for pairs in groups]
    removed: set[tuple[int, int]] = set()
    for _, g, i in sorted(places, reverse=True):
        if len(removed) < abs(excess) and left[g] > 1:
            removed.add((g, i))
            left[g] -= 1
    return [[p for i, p in enumerate(pairs) if (g, i) not in removed] for g, pairs in enumerate(groups)]
