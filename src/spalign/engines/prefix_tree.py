"""Token sequences that begin alike, as a tree: what several share stands once, so a model runs it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(slots=True)
class Node:
    """`tokens` follow those of the parent. A leaf ends the sequence `leaf`; an inner node has children and no leaf."""

    tokens: Tokens
    children: list[Node] = field(default_factory=list)
    leaf: int | None = None


def prefix_tree(sequences: Sequence[Tokens], limits: Sequence[int], *, share_from: int) -> list[Node]:
    """The roots of a tree whose leaves spell `sequences`.

    limits: how many leading tokens of each sequence may be shared (fewer than it has: a leaf is never empty).
    share_from: a shared piece shorter than this many tokens is not worth a node of its own.
    """

    def grow(members: list[int], at: int) -> list[Node]:
        by_start: dict[Tokens, list[int]] = {}
        nodes: list[Node] = []
        for i in members:
            if limits[i] - at >= share_from:
                by_start.setdefault(sequences[i][at : at + share_from], []).append(i)
            else:
                nodes.append(Node(sequences[i][at:], leaf=i))
        for same in by_start.values():
            if len(same) == 1:
                nodes.append(Node(sequences[same[0]][at:], leaf=same[0]))
                continue
            end = _common(sequences, same, at + share_from, min(limits[i] for i in same))
            nodes.append(Node(sequences[same[0]][at:end], children=grow(same, end)))
        return nodes

    return grow(list(range(len(sequences))), 0)


def _common(sequences: Sequence[Tokens], members: Sequence[int], start: int, stop: int) -> int:
    """Where the sequences `members`, equal up to `start`, first differ; at most `stop`."""
    low, high = (f(sequences[i][start:stop] for i in members) for f in (min, max))  # what these two share, all share
    return start + next((n for n, (a, b) in enumerate(zip(low, high, strict=True)) if a != b), stop - start)
