"""From preference rows to groups: what is shared, what is dropped, what is refused."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from spalign.errors import DataError
from spalign.training.groups import EncodedRow, TrainingGroup, TrainingPair, group_rows
from spalign.training.rows import RowTokens, encode_row

P, Q = (1, 2), (1, 3)
A, B, C = (5, 6, 9), (7, 9), (8, 9)


def row(prompt: tuple[int, ...] = P, chosen: tuple[int, ...] = A, rejected: tuple[int, ...] = B, gap: float | None = 1.0) -> EncodedRow:
    return EncodedRow(prompt, chosen, rejected, gap, "r")


def grouped(*rows: EncodedRow, max_length: int = 100, needs_gap: bool = True) -> tuple[list[TrainingGroup], dict[str, int]]:
    groups, dropped = group_rows(rows, max_length=max_length, needs_gap=needs_gap)
    return groups, dict(dropped)


class Lengths(RowTokens):
    """A text's token is its length; 1 begins a text, 100 and 101 stand around a conversation, 9 ends an answer."""

    def __init__(self) -> None:
        pass

    def text(self, text: str) -> list[int]:
        return [1, len(text)]

    def chat(self, turns: list[Any], options: Mapping[str, Any]) -> list[int]:
        return [100, *(len(t["content"]) for t in turns), *options.get("more", ()), 101]

    def after_text(self, text: str) -> list[int]:
        return [len(text), 9]

    def after_chat(self, turn: Mapping[str, Any], turns: list[Any], options: Mapping[str, Any]) -> list[int]:
        return [len(turn["content"]), 9]


def encoded(value: Any, index: int = 0) -> EncodedRow:
    return encode_row(value, index, tokens=Lengths())


# -- grouping ---------------------------------------------------------------------------------------------------------


def test_one_prompt_is_one_group_and_each_response_stands_once() -> None:
    # A beats B and C, B beats C: three pairs, three responses, numbered as they first appear
    groups, dropped = grouped(row(P, A, B, 2.0), row(P, A, C, 3.0), row(P, B, C, 1.0))
    pairs = (TrainingPair(0, 1, 2.0), TrainingPair(0, 2, 3.0), TrainingPair(1, 2, 1.0))
    assert groups == [TrainingGroup(P, (A, B, C), pairs, "r")]
    assert dropped == {}


def test_prompts_keep_their_order_and_need_not_be_adjacent() -> None:
    groups, _ = grouped(row(Q, A, B), row(P, A, B), row(Q, C, A))
    assert [g.prompt for g in groups] == [Q, P]
    assert [len(g.pairs) for g in groups] == [2, 1]
    assert groups[0].responses == (A, B, C)


def test_the_same_response_to_another_prompt_is_not_shared() -> None:
    groups, _ = grouped(row(P, A, B), row(Q, A, B))
    assert [g.responses for g in groups] == [(A, B), (A, B)]


def test_a_repeated_pair_counts_once_and_is_reported() -> None:
    groups, dropped = grouped(row(gap=2.0), row(gap=2.0), row(chosen=B, rejected=A, gap=1.0))
    assert groups[0].pairs == (TrainingPair(0, 1, 2.0), TrainingPair(1, 0, 1.0))  # the opposite pair is another pair
    assert dropped == {"repeated": 1}


def test_rows_without_a_gap_get_one_where_none_is_needed() -> None:
    groups, _ = grouped(row(gap=None), needs_gap=False)
    assert groups[0].pairs[0].gap == 1.0


# -- drops ------------------------------------------------------------------------------------------------------------


def test_drops_are_counted_by_reason_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    bad = [row(prompt=()), row(chosen=()), row(rejected=()), row(chosen=A, rejected=A), row(prompt=(1,) * 98)]
    with caplog.at_level(logging.WARNING, logger="spalign"):
        groups, dropped = grouped(row(), *bad)
    assert len(groups) == 1
    assert dropped == {"empty": 3, "identical sides": 1, "too long": 1}
    assert caplog.messages == ["spalign: dropped rows: 3 empty, 1 identical sides, 1 too long"]


def test_nothing_dropped_nothing_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="spalign"):
        grouped(row())
    assert caplog.messages == []


@pytest.mark.parametrize(("chosen", "rejected"), [(A, B), (B, A)])
def test_the_length_bound_is_inclusive_and_looks_at_the_longer_side(chosen: tuple[int, ...], rejected: tuple[int, ...]) -> None:
    # 2 prompt tokens and 3 of the longer side
    assert grouped(row(P, chosen, rejected), max_length=5)[1] == {}
    assert grouped(row(P, chosen, rejected), max_length=4) == ([], {"too long": 1})


def test_a_gap_that_is_needed_and_missing_is_refused() -> None:
    with pytest.raises(DataError, match=r"row r has no gap\n.*set alpha to 0"):
        grouped(row(gap=None))


@pytest.mark.parametrize("needs_gap", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
@pytest.mark.parametrize("column", ["gap", "weight", "margin"])
def test_numbers_that_are_negative_or_not_finite_are_dropped_and_counted(column: str, bad: float, needs_gap: bool) -> None:
    groups, dropped = grouped(row(), replace(row(P, A, C), **{column: bad}), needs_gap=needs_gap)
    unused = column == "gap" and not needs_gap
    assert [len(g.pairs) for g in groups] == [2 if unused else 1]
    assert dropped == ({} if unused else {"gap, weight or margin negative or not finite": 1})
    with pytest.raises(DataError, match="negative or not finite"):
        TrainingPair(0, 1, **{"gap": 1.0, column: bad})


def test_a_gap_of_zero_is_fine() -> None:
    assert grouped(row(gap=0.0))[0][0].pairs[0].gap == 0.0


@pytest.mark.parametrize(
    ("prompt", "responses", "pairs"),
    [
        ((), (A, B), (TrainingPair(0, 1, 1.0),)),
        (P, (A, ()), (TrainingPair(0, 1, 1.0),)),
        (P, (A, B), ()),
        (P, (A, B), (TrainingPair(0, 2, 1.0),)),
        (P, (A, B), (TrainingPair(-1, 0, 1.0),)),
    ],
)
def test_a_group_that_cannot_be_trained_on_is_refused(prompt: Any, responses: Any, pairs: Any) -> None:
    with pytest.raises(DataError, match="group g"):
        TrainingGroup(prompt, responses, pairs, "g")


# -- TRL's formats ----------------------------------------------------------------------------------------------------


def test_conversational_row() -> None:
    got = encoded(
        {
            "prompt": [{"role": "system", "content": "abc"}, {"role": "user", "content": "ab"}],
            "chosen": [{"role": "assistant", "content": "abcd"}],
            "rejected": [{"role": "assistant", "content": "a"}],
            "gap": 2,
        }
    )
    assert got == EncodedRow((100, 3, 2, 101), (4, 9), (1, 9), 2.0, "0")


def test_plain_row() -> None:
    assert encoded({"prompt": "abc", "chosen": "abcd", "rejected": "a"}, 7) == EncodedRow((1, 3), (4, 9), (1, 9), None, "7")


def test_the_rows_own_id_names_it() -> None:
    assert encoded({"prompt": "a", "chosen": "b", "rejected": "c", "id": "p1>p2"}).name == "p1>p2"


def test_ids_are_taken_as_they_are() -> None:
    # no EOS added, no text needed
    got = encoded({"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [7, 8], "gap": 0.5})
    assert got == EncodedRow((4, 5), (6,), (7, 8), 0.5, "0")


def test_ids_win_over_text_column_by_column() -> None:
    got = encoded({"prompt": "abc", "chosen": "abcd", "chosen_ids": [6], "rejected": "a", "rejected_ids": None})
    assert got == EncodedRow((1, 3), (6,), (1, 9), None, "0")


def test_empty_ids_are_an_empty_completion_not_a_call_for_the_text() -> None:
    got = encoded({"prompt": "abc", "chosen": "abcd", "chosen_ids": [], "rejected": "a"})
    assert got.chosen == ()
    assert group_rows([got], max_length=9, needs_gap=False)[1] == {"empty": 1}


@pytest.mark.parametrize("empty", ["", [{"role": "assistant", "content": ""}]])
def test_an_empty_text_is_an_empty_completion_not_a_lone_eos(empty: Any) -> None:
    assert encoded({"prompt": "abc", "chosen": empty, "rejected": "a"}).chosen == ()


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named(column: str) -> None:
    value = {"prompt": "abc", "chosen": "abcd", "rejected": "a"}
    del value[column]
    if column == "prompt":  # then it would be what both sides begin with alike
        value |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(DataError, match=f"row 3 has no {column}"):
        encoded(value, 3)


@pytest.mark.parametrize(
    "completion",
    [
        5,
        [],
        ["a"],
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    ],
)
def test_a_completion_of_another_shape_is_refused(completion: Any) -> None:
    with pytest.raises(DataError, match="row 0: a completion must be a string or one assistant turn"):
        encoded({"prompt": "a", "chosen": completion, "rejected": "b"})


def test_a_gap_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="row 0: gap is 'large'"):
        encoded({"prompt": "a", "chosen": "b", "rejected": "c", "gap": "large"})
