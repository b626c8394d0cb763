"""Packed tokens into rows and back: the gradients that are copied are those that would have been added up."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalign.training.attention import _Back, _Rows, lay_out

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4)


def spans_of(shapes: list[tuple[int, list[int]]]) -> list[tuple[range, list[range]]]:
    at, spans = 0, []
    for prompt, responses in shapes:
        spans.append((range(at, at + prompt), []))
        at += prompt
        for n in responses:
            spans[-1][1].append(range(at, at + n))
            at += n
    return spans


def test_by_hand() -> None:
    # a prompt of 2 with responses of 1 and 2; a prompt of 1 with a response of 1
    packed = lay_out(spans_of([(2, [1, 2]), (1, [1])]))
    (block,) = packed["blocks"]
    assert block["queries"].tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 6, 0, 0]]
    assert packed["back"].tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert packed["again"].tolist() == [4, 5]  # the second row's prompt
    assert packed["of"].tolist() == [0, 1]


@given(SHAPES, st.integers(0, 2**31))
def test_gradients_are_those_of_index_select(shapes: list[tuple[int, list[int]]], seed: int) -> None:
    packed = lay_out(spans_of(shapes))
    back = packed["back"]
    assert len(set(back.tolist())) == len(back), "no place is taken twice"
    if len(packed["blocks"]) == 2:
        return
    rows = packed["blocks"][0]["queries"]
    torch.manual_seed(seed)
    tokens = torch.randn(len(back), 3, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(rows.numel(), 3, dtype=torch.float64)
    pull[[i for i in range(rows.numel()) if i not in {*back.tolist(), *packed["again"].tolist()}]] = 0  # behind short rows
    out = torch.randn(len(back), 3, dtype=torch.float64)

    def gradients(rows_of: Tensor, tokens_of: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad((rows_of * pull).sum(), tokens), *torch.autograd.grad((tokens_of * out).sum(), wide)]

    wide = torch.randn(rows.numel(), 3, dtype=torch.float64, requires_grad=True)
    flat = rows.reshape(-1)
    theirs = gradients(tokens.index_select(0, flat), wide.index_select(0, back))
    ours = gradients(_Rows.apply(tokens, flat, back, packed["again"], packed["of"]), _Back.apply(wide, back))  # type: ignore[no-untyped-call]
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)
