"""`next_tokens`: greedy, the nucleus by hand, and the shortlist path against a plain full sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from spalign.engines.sampling import next_tokens, uniforms

# Four tokens; in order of likelihood 1 (0.5), 3 (0.25), 2 (0.15), 0 (0.1).
PROBABILITIES = [0.10, 0.50, 0.15, 0.25]
LOGITS = torch.tensor([[math.log(p) + 3.0 for p in PROBABILITIES]])  # logits are known up to a constant: here 3


def drawn(u: list[float], *, temperature: float = 1.0, top_p: float = 1.0, logits: Tensor = LOGITS) -> list[int]:
    rows = logits.expand(len(u), -1)
    return next_tokens(rows, torch.tensor(u, dtype=torch.float64), temperature=temperature, top_p=top_p).tolist()  # type: ignore[no-any-return]


def full_sort(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> list[int]:
    """The same inverse transform, row by row over the whole sorted vocabulary in double precision."""
    chosen = []
    for row, x in zip(logits.double() / temperature, u.tolist(), strict=True):
        p, ids = row.softmax(-1).sort(descending=True)
        mass = p.cumsum(-1)
        n = min(int((mass < top_p).sum()) + 1, len(mass))
        chosen.append(int(ids[min(int((mass[:n] <= x * mass[n - 1]).sum()), n - 1)]))
    return chosen


def test_greedy_is_the_most_likely_token_whatever_u() -> None:
    assert drawn([0.0, 0.5, 0.999], temperature=0.0, top_p=0.1) == [1, 1, 1]


def test_inverse_transform_by_hand() -> None:
    # Cumulative, in order of likelihood: token 1 to 0.50, token 3 to 0.75, token 2 to 0.90, token 0 to 1.
    assert drawn([0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 0.9999999]) == [1, 1, 3, 3, 2, 2, 0, 0]


def test_the_nucleus_by_hand() -> None:
    # top_p 0.7: 0.5 is not enough, 0.75 is, so tokens 1 and 3 with 2/3 and 1/3.
    assert drawn([0.0, 0.66, 0.67, 0.9999999], top_p=0.7) == [1, 1, 3, 3]
    # top_p 0.8: token 2 joins, 0.5, 0.25, 0.15 of 0.9: borders 0.5556 and 0.8333.
    assert drawn([0.55, 0.56, 0.83, 0.84], top_p=0.8) == [1, 3, 3, 2]
    # Less than the likeliest token has: that one alone.
    assert drawn([0.0, 0.9999999], top_p=0.3) == [1, 1]


def test_temperature_by_hand() -> None:
    # Temperature 0.5 squares the odds: 0.25, 0.0625, 0.0225, 0.01 of 0.345: borders 0.7246, 0.9058, 0.9710.
    assert drawn([0.72, 0.73, 0.90, 0.91, 0.97, 0.972], temperature=0.5) == [1, 3, 3, 2, 2, 0]


def test_frequencies_of_the_nucleus() -> None:
    # top_p 0.8: tokens 1, 3, 2 with 5/9, 5/18, 1/6 and never token 0. 20,000 draws: 4 SD are at most 4 * sqrt(.25/20000) = 0.0142.
    counts = np.bincount(drawn(uniforms(11, 20_000).tolist(), top_p=0.8), minlength=4) / 20_000
    assert counts[0] == 0
    assert counts[[1, 3, 2]] == pytest.approx([5 / 9, 5 / 18, 1 / 6], abs=0.0142)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.95), (0.7, 0.5), (1.3, 1.0)])
@pytest.mark.parametrize("spread", [0.0, 0.02, 0.5, 2.0, 6.0])
def test_shortlists_give_what_a_full_sort_gives(spread: float, temperature: float, top_p: float) -> None:
    """6,000 tokens on a ramp of 0.6: without noise the 4,096 likeliest hold (e^.6 - e^.19) / (e^.6 - 1) = 0.75, short of 0.95 and of 1."""
    generator = torch.Generator().manual_seed(5)
    # all logits differ (a shuffled ramp besides the noise), since the order of equal ones is nobody's promise
    ramp = torch.stack([torch.randperm(6000, generator=generator) for _ in range(24)]).float() * 1e-4
    logits = ramp + spread * torch.randn(24, 6000, generator=generator)
    u = torch.rand(24, generator=generator, dtype=torch.float64)
    got = next_tokens(logits, u, temperature=temperature, top_p=top_p).tolist()
    # float32 sums may fall on the other side of a border that u all but touches: then the neighbour in the order is drawn
    want = full_sort(logits, u, temperature, top_p)
    rank = [{int(t): r for r, t in enumerate(row.argsort(descending=True))} for row in logits]
    off = [abs(rank[i][g] - rank[i][w]) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    assert max(off) <= 1
    assert sum(off) <= 2


def test_flat_logits_reach_past_both_shortlists() -> None:
    # Equal logits, top_p 0.95: the nucleus is 5,700 of 6,000 tokens. u just below 1 draws its last one, which no shortlist of 4,096 holds.
    logits = torch.linspace(1e-3, 0, 6000).unsqueeze(0)  # equal but for the order: token i is the i-th
    (token,) = drawn([1 - 1e-6], top_p=0.95, logits=logits)
    # mass of the first m tokens is m/6000 to within 0.05%: the last of the nucleus is token 5,699, give or take 3
    assert token == pytest.approx(5699, abs=3)
    (middle,) = drawn([0.5], top_p=0.95, logits=logits)
    assert middle == pytest.approx(2850, abs=3)


def test_a_row_does_not_depend_on_its_company() -> None:
    generator = torch.Generator().manual_seed(3)
    peaked, flat = 8 * torch.randn(20, 6000, generator=generator), 0.1 * torch.randn(20, 6000, generator=generator)
    logits = torch.stack([peaked, flat], 1).reshape(40, 6000)  # rows that leave at the first shortlist beside rows that go to the end
    u = torch.rand(40, generator=generator, dtype=torch.float64)
    together = next_tokens(logits, u, temperature=1.0, top_p=0.95).tolist()
    alone = [int(next_tokens(logits[i : i + 1], u[i : i + 1], temperature=1.0, top_p=0.95)) for i in range(40)]
    assert together == alone
    back = torch.arange(39, -1, -1)
    assert next_tokens(logits[back], u[back], temperature=1.0, top_p=0.95).tolist() == together[::-1]


def test_half_precision_logits_and_impossible_tokens() -> None:
    logits = torch.tensor([[1.0, float("-inf"), 1.0]], dtype=torch.bfloat16)
    assert set(drawn([0.0, 0.3, 0.7, 0.9999999999], logits=logits)) == {0, 2}  # the last u rounds to 1 in float32


def test_uniforms_are_the_seeds_own_stream() -> None:
    a = uniforms(1 << 62, 64)
    assert ((a >= 0) & (a < 1)).all()
    assert (uniforms(1 << 62, 8) == a[:8]).all()  # a longer completion begins alike
    assert not (uniforms((1 << 62) + 1, 8) == a[:8]).any()
    assert a.mean() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 64))  # 4 SD of the mean of 64
