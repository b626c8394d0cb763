"""Preference pairs (SPA, Eq. 2), the choice among them, and their weights (Eq. 3)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from operator import sub
from typing import TYPE_CHECKING, Any, NamedTuple

from spalign.config import PairsConfig
from spalign.constitution import Objective
from spalign.errors import DataError
from spalign.preference.denoise import is_usable
from spalign.preference.order import SLACK, levels, score_of
from spalign.types import PreferencePair, PromptGroup, Response

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs kept, a list a group; how many went by the cap a prompt (capped) and by the balance of lengths (unbalanced)."""

    pairs: list[list[PreferencePair]]
    capped: int
    unbalanced: int


class Place(NamedTuple):
    """A pair by its places: `chosen` and `rejected` among the responses of its group, `decided_by` among the objectives."""

    chosen: int
    rejected: int
    margin: float
    gap: float
    decided_by: int


def make_pairs(group: PromptGroup, objectives: Sequence[Objective], config: PairsConfig) -> list[PreferencePair]:
    """All (x, y, y-) of Eq. 2 over Y = usable candidates + refined: y lexicographically greater, margin at least delta.

    G is the level (spalign.preference.order), so margin and gap are in score points. Of responses with the same tokens the
    first by id stands. Greatest margin first. With `weights`, greater is the one with the greater weighted mean.
    """
    responses = [r for r in (*group.candidates, group.refined) if r is not None]
    refined = None if group.refined is None else len(responses) - 1
    places = pair_places(responses, [r.token_ids for r in responses], objectives, config, refined=refined)
    return [
        PreferencePair(group.prompt, responses[p.chosen], responses[p.rejected], p.margin, p.gap, objectives[p.decided_by].name)
        for p in places
    ]


def pair_places(
    responses: Sequence[Response],
    tokens: Sequence[Hashable],
    objectives: Sequence[Objective],
    config: PairsConfig,
    *,
    refined: int | None = None,
) -> list[Place]:
    """`make_pairs` for one group's responses, whose texts and tokens nobody looks at but for `tokens`, equal where they are.

    refined: which of them is the refined one.
    """
    distinct: dict[Hashable, int] = {}
    for i in sorted(range(len(responses)), key=lambda i: responses[i].id):
        if is_usable(responses[i], objectives):
            distinct.setdefault(tokens[i], i)
    of = levels if config.weights is None else partial(weighted, weights=config.weights)
    by_level = sorted([(of(responses[i], objectives), i) for i in distinct.values()], reverse=True)
    places, least = [], config.delta - SLACK
    for (up, chosen), (down, rejected) in combinations(by_level, 2):
        if up == down:
            continue
        if config.weights is None:
            differences = list(map(sub, up, down))
            decided_by = 0 if differences[0] else next(k for k, d in enumerate(differences) if d)
        else:
            differences = leads(responses[chosen], responses[rejected], objectives, config.weights)
            decided_by = differences.index(max(differences))
        margin = math.fsum(map(abs, differences))
        if margin >= least and (config.chosen == "any" or chosen == refined):
            gap = abs(math.fsum(differences))
            places.append(Place(chosen, rejected, margin, gap if gap > SLACK else 0.0, decided_by))
    return sorted(places, key=lambda p: (-p.margin, responses[p.chosen].id, responses[p.rejected].id))


def weighted(response: Response, objectives: Sequence[Objective], weights: Sequence[float]) -> tuple[float, ...]:
    """The baseline's order: the weighted mean of the raw scores, in score points. Thresholds and resolutions mean nothing to it."""
    return (math.fsum(w * score_of(response, o) for w, o in zip(weights, objectives, strict=True)) / math.fsum(weights),)


def leads(chosen: Response, rejected: Response, objectives: Sequence[Objective], weights: Sequence[float]) -> list[float]:
    """By how much the winner is ahead on each objective, in score points, the weights scaled to a mean of 1 over those that have one.

    So equal weights give the margin and the gap that Eq. 2 and Eq. 3 have, and a single objective its own difference.
    """
    scale = sum(w > 0 for w in weights) / math.fsum(weights)
    return [scale * w * (score_of(chosen, o) - score_of(rejected, o)) for w, o in zip(weights, objectives, strict=True)]


def select_pairs(pairs_by_group: Sequence[Sequence[PreferencePair]], config: PairsConfig) -> Selection:
    """At most `max_per_prompt` pairs a group; with `balance_length`, as many shorter winners as longer ones over the run.

    Groups stay in order, pairs go by margin. No group loses its last pair: length never drops a prompt.
    """
    groups = [sorted(pairs, key=_rank) for pairs in pairs_by_group]
    kept = [[pairs[i] for i in capped(list(map(_longer, pairs)), config)] for pairs in groups]
    given, after_cap = sum(map(len, groups)), sum(map(len, kept))
    if config.balance_length and after_cap:
        flat = [p for pairs in kept for p in pairs]
        goes = unbalanced(
            [p.margin for p in flat],
            places_of([(p.prompt.id, p.chosen.id, p.rejected.id) for p in flat]),
            [_longer(p) for p in flat],
            [len(pairs) for pairs in kept],
        )
        stays = iter(~goes)
        kept = [[p for p in pairs if next(stays)] for pairs in kept]
    return Selection(kept, capped=given - after_cap, unbalanced=after_cap - sum(map(len, kept)))


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
    return longer(len(pair.chosen.token_ids), len(pair.rejected.token_ids))


def longer(won: int, lost: int) -> int:
    """1: the winner has more tokens than the loser; -1: fewer; 0: as many."""
    return (won > lost) - (won < lost)


def capped(longer: Sequence[int], config: PairsConfig) -> list[int]:
    """Which of a group's pairs stay under `max_per_prompt`, in order. longer: of each pair, best first.

    The best ones; with balance, shorter and longer winners take turns and equal ones stand in for the kind that lacks.
    """
    most = config.max_per_prompt
    if most is None or len(longer) <= most:
        return list(range(len(longer)))
    if not config.balance_length:
        return list(range(most))
    queues = {kind: deque(i for i, k in enumerate(longer) if k == kind) for kind in (-1, 0, 1)}
    turn = next((kind for kind in longer if kind), 1)  # the kind with the greatest margin begins
    taken = []
    for _ in range(most):
        taken.append((queues[turn] or queues[0] or queues[-turn]).popleft())
        turn = -turn
    return sorted(taken)


def unbalanced(margins: ArrayLike, ranks: ArrayLike, longer: ArrayLike, sizes: ArrayLike) -> NDArray[np.bool_]:
    """Which of a run's pairs go, so that as many winners are shorter as are longer; (pairs,).

    margins, longer: (pairs,), group after group; ranks: (pairs,), their places by prompt id, chosen id and rejected id; sizes: (groups,),
    how many of the pairs are each group's. The least margins of the more frequent kind go, among equal ones the last by rank, until both
    kinds are equally frequent or only last pairs of a group remain.
    """
    import numpy as np

    kinds = np.asarray(longer, dtype=np.int8)
    excess = int(kinds.sum(dtype=np.int64))
    frequent = np.flatnonzero(kinds == (1 if excess > 0 else -1))
    order = np.lexsort((-np.asarray(ranks, dtype=np.int64)[frequent], np.asarray(margins, dtype=np.float64)[frequent]))
    left = np.asarray(sizes, dtype=np.int64)
    group_of = np.repeat(np.arange(len(left)), left)
    goes, removed, left = np.zeros(len(kinds), dtype=np.bool_), 0, left.tolist()
    for i in frequent[order].tolist():
        if removed == abs(excess):
            break
        if left[group_of[i]] > 1:
            goes[i] = True
            removed += 1
            left[group_of[i]] -= 1
    return goes


def places_of(names: Sequence[Any]) -> list[int]:
    """Where each name stands when they are sorted; equal ones in the order given."""
    places = [0] * len(names)
    for place, i in enumerate(sorted(range(len(names)), key=names.__getitem__)):
        places[i] = place
    return places
