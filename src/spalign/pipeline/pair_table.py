"""Pairs of many prompts as a table of numbers, about 50 bytes a pair, and the choice among all of a run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spalign.config import PairsConfig, RunConfig
from spalign.constitution import Objective
from spalign.preference import capped, longer, pair_places, places_of, unbalanced, weights

PAIR = np.dtype(
    [
        ("group", np.int32),
        ("chosen", np.int32),
        ("rejected", np.int32),
        ("margin", np.float64),
        ("gap", np.float64),
        ("decided_by", np.int32),
        ("longer", np.int8),
        ("place", np.int32),
        ("weight", np.float64),
    ]
)
"""A pair by its places: the group's row in its part; chosen and rejected among the candidates and the refined response; decided_by, which
objective; longer, as the function of that name says; place among its group's pairs by ids; weight, 0 before the run's pairs are chosen."""
Pairs = NDArray[np.void]


@dataclass(frozen=True, slots=True)
class MadePairs:
    """The pairs of one part under the cap. names: prompt ids of the groups that have any; sizes: how many; given: pairs before the cap."""

    names: list[str]
    sizes: list[int]
    given: int
    pairs: Pairs

    def only(self, stays: NDArray[np.bool_]) -> MadePairs:
        """Of the groups with pairs those that stay; (groups,)."""
        names = [x for x, stay in zip(self.names, stays, strict=True) if stay]
        sizes = [x for x, stay in zip(self.sizes, stays, strict=True) if stay]
        return MadePairs(names, sizes, self.given, self.pairs[np.repeat(stays, self.sizes)])


class PairMaker:
    """Makes the pairs of one part, group by group in their order."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._given = 0
        self._rows: list[tuple[float, ...]] = []

    def add(
        self, row: int, name: str, responses: Sequence[Any], refined: int | None, objectives: Sequence[Objective], config: PairsConfig
    ) -> bool:
        """The pairs of the group in that row of its part; whether it has any. responses: stored ones; refined: which of them is that."""
        places = pair_places(responses, [r.tokens for r in responses], objectives, config, refined=refined)
        lengths = [r.length for r in responses]
        kinds = [longer(lengths[p.chosen], lengths[p.rejected]) for p in places]
        stay = capped(kinds, config)
        by_ids = places_of([(responses[places[i].chosen].id, responses[places[i].rejected].id) for i in stay])
        self._given += len(places)
        if not stay:
            return False
        self._names.append(name)
        self._sizes.append(len(stay))
        self._rows += [(row, *places[i], kinds[i], place, 0.0) for i, place in zip(stay, by_ids, strict=True)]
        return True

    def made(self) -> MadePairs:
        return MadePairs(self._names, self._sizes, self._given, np.array(self._rows, dtype=PAIR))


def selected(made: Sequence[MadePairs], config: RunConfig) -> list[Pairs]:
    """Of each part the pairs that stay when lengths are balanced over the run, with their weights."""
    parts = [part.pairs for part in made]
    ends = np.cumsum([len(pairs) for pairs in parts])[:-1]
    every = np.concatenate(parts) if parts else np.empty(0, dtype=PAIR)
    stays = np.ones(len(every), dtype=np.bool_)
    if config.pairs.balance_length and len(every):
        sizes = [n for part in made for n in part.sizes]
        prompts = np.array(places_of([name for part in made for name in part.names]), dtype=np.int64)
        ranks = np.repeat(prompts, sizes) * (int(every["place"].max()) + 1) + every["place"]
        stays = ~unbalanced(every["margin"], ranks, every["longer"], sizes)
    every["weight"][stays] = weights(every["gap"][stays].tolist(), config.train.alpha)
    return [pairs[stay] for pairs, stay in zip(np.split(every, ends), np.split(stays, ends), strict=True)] if parts else []
