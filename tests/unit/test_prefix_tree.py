"""The prefix tree: it spells every sequence once, shares what may be shared, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from spalign.engines.prefix_tree import Node, Tokens, prefix_tree

properties = settings(deadline=None, max_examples=120)


@st.composite
def work(draw: st.DrawFn) -> tuple[list[Tokens], list[int], int]:
    """Sequences over two tokens, so that many begin alike, some of them equal; limits below their lengths; share_from."""
    beginning = draw(st.lists(st.integers(0, 1), max_size=8))
    tails = draw(st.lists(st.tuples(st.integers(0, len(beginning)), st.lists(st.integers(0, 1), min_size=1, max_size=6)), max_size=8))
    sequences = [(*beginning[:keep], *tail) for keep, tail in tails]
    limits = [draw(st.integers(0, len(s) - 1)) for s in sequences]
    return sequences, limits, draw(st.integers(1, 4))


def paths(nodes: list[Node], above: tuple[Node, ...] = ()) -> Iterator[tuple[Node, ...]]:
    """Every leaf with the nodes above it, from the root."""
    for node in nodes:
        if node.leaf is not None:
            assert not node.children
            yield (*above, node)
        else:
            yield from paths(node.children, (*above, node))


def inner(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        if node.leaf is None:
            yield node
            yield from inner(node.children)


def tokens(nodes: list[Node]) -> int:
    return sum(len(n.tokens) + tokens(n.children) for n in nodes)


def plain(nodes: list[Node]) -> list[object]:
    """The tree as nested lists: tokens and the leaf's number, or tokens and children."""
    return [(n.tokens, plain(n.children) if n.leaf is None else n.leaf) for n in nodes]


def test_a_tree_by_hand() -> None:
    sequences = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (7,)]
    limits = [3, 3, 2, 0]  # all but the last token
    assert plain(prefix_tree(sequences, limits, share_from=1)) == [
        ((7,), 3),
        ((1, 2), [((6,), 2), ((3,), [((4,), 0), ((5,), 1)])]),
    ]
    # a piece of one token, the 3, is no longer worth a node
    assert plain(prefix_tree(sequences, limits, share_from=2)) == [((7,), 3), ((1, 2), [((3, 4), 0), ((3, 5), 1), ((6,), 2)])]
    # and the 1, 2 neither
    assert plain(prefix_tree(sequences, limits, share_from=3)) == [((1, 2, 6), 2), ((7,), 3), ((1, 2, 3), [((4,), 0), ((5,), 1)])]


def test_equal_sequences_share_all_but_what_the_limit_keeps() -> None:
    assert plain(prefix_tree([(1, 2, 3)] * 2, [2, 2], share_from=1)) == [((1, 2), [((3,), 0), ((3,), 1)])]


def test_the_lowest_limit_of_those_who_share_holds() -> None:
    assert plain(prefix_tree([(1, 2, 3, 4), (1, 2, 3, 5)], [3, 2], share_from=2)) == [((1, 2), [((3, 4), 0), ((3, 5), 1)])]


def test_no_sequences_no_tree() -> None:
    assert prefix_tree([], [], share_from=8) == []


@properties
@given(work())
def test_the_leaves_spell_all_sequences_each_once(case: tuple[list[Tokens], list[int], int]) -> None:
    sequences, limits, share_from = case
    spelled = [(path[-1].leaf, sum((n.tokens for n in path), ())) for path in paths(prefix_tree(sequences, limits, share_from=share_from))]
    assert sorted(spelled) == list(enumerate(sequences))


@properties
@given(work())
def test_nothing_beyond_a_limit_is_shared(case: tuple[list[Tokens], list[int], int]) -> None:
    sequences, limits, share_from = case
    for path in paths(prefix_tree(sequences, limits, share_from=share_from)):
        assert sum(len(n.tokens) for n in path[:-1]) <= limits[path[-1].leaf or 0]


@properties
@given(work())
def test_no_leaf_is_empty(case: tuple[list[Tokens], list[int], int]) -> None:
    sequences, limits, share_from = case
    assert all(path[-1].tokens for path in paths(prefix_tree(sequences, limits, share_from=share_from)))


@properties
@given(work())
def test_a_shared_piece_is_long_enough_and_really_shared(case: tuple[list[Tokens], list[int], int]) -> None:
    sequences, limits, share_from = case
    for node in inner(prefix_tree(sequences, limits, share_from=share_from)):
        assert len(node.tokens) >= share_from
        assert len(list(paths([node]))) >= 2


@properties
@given(work())
def test_the_tree_never_holds_more_than_the_sequences(case: tuple[list[Tokens], list[int], int]) -> None:
    sequences, limits, share_from = case
    assert tokens(prefix_tree(sequences, limits, share_from=share_from)) <= sum(map(len, sequences))


@properties
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=9),
    st.lists(st.integers(0, 1), max_size=5),
    st.lists(st.integers(0, 1), max_size=5),
    st.integers(1, 9),
)
def test_a_long_enough_shared_beginning_of_two_stands_once(same: list[int], one: list[int], other: list[int], share_from: int) -> None:
    a, b = (*same, 2, *one), (*same, 3, *other)  # they differ right after `same`
    tree = prefix_tree([a, b], [len(a) - 1, len(b) - 1], share_from=share_from)
    once = len(same) if len(same) >= share_from else 0
    assert tokens(tree) == len(a) + len(b) - once
