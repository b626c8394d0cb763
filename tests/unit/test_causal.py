"""Causal attention on CPUs, held against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spalign.training.causal import BLOCK, causal_attention

SCALING = 0.3


def inputs(rows: int, heads: int, kv_heads: int, width: int, dim: int) -> tuple[Tensor, ...]:
    torch.manual_seed(width)
    shapes = ((rows, n, width, dim) for n in (heads, kv_heads, kv_heads, heads))
    return tuple(torch.randn(shape) for shape in shapes)


def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax of scaled products over the places up to one's own."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = SCALING * query @ k.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def run(what: object, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = what(*leaves)  # type: ignore[operator]
    out.backward(g.to(dtype))
    return [out.detach().double(), *(x.grad.double() for x in leaves if x.grad is not None)]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal_attention(q, k, v, SCALING)


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALING, enable_gqa=True)


def error(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("width", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_are_those_of_the_definition(width: int, heads: int, kv_heads: int) -> None:
    some = inputs(3, heads, kv_heads, width, 8)
    # width 1 sees itself alone: no gradient reaches its query or key, and 0/0 is no error
    left = slice(None) if width > 1 else slice(0, 4, 3)
    expected, found = run(definition, torch.float64, *some), run(ours, torch.float32, *some)
    assert max(error(found[left], expected[left])) < 1e-5
    if width == 1:
        assert all(float(x.abs().max()) == 0 for x in found[1:3])


def test_bf16_is_no_further_from_the_truth_than_the_kernel() -> None:
    some = inputs(2, 6, 2, 200, 64)
    some = tuple(x.bfloat16().float() for x in some)
    expected = run(definition, torch.float64, *some)
    here, there = (error(run(what, torch.bfloat16, *some), expected) for what in (ours, kernel))
    assert max(here) < 0.01
    assert max(here) < 1.2 * max(there)


def test_scores_are_not_rounded_to_bf16() -> None:
    # scores of 1000 and 1001 are the same bf16 number (steps of 4 there): rounded, both answers would weigh 0.5
    q = torch.tensor([[[[1.0, 0.0], [1000.0, 1.0]]]]).bfloat16()
    k = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]]).bfloat16()
    v = torch.tensor([[[[0.0], [1.0]]]]).bfloat16()
    out = causal_attention(q, k, v.expand(1, 1, 2, 2), 1.0)
    assert float(out[0, 0, 1, 0]) == pytest.approx(1 / (1 + 2.718281828**-1), abs=4e-3)  # sigmoid(1) = 0.731
