"""Eq. 3 by hand, and what its value must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from spalign.training.loss import pair_weights, spa_loss

logps = st.floats(-8, 0)
pairs = st.lists(st.tuples(logps, logps, st.floats(0, 20)), min_size=1, max_size=8)


def vec(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def test_weights_by_hand() -> None:
    # mean of 1, 2, 6 is 3: ratios 1/3, 2/3, 2
    gaps = vec(1, 2, 6)
    assert_close(pair_weights(gaps, 3.0, alpha=1), vec(1 / 3, 2 / 3, 2))
    assert_close(pair_weights(gaps, 3.0, alpha=2), vec(1 / 9, 4 / 9, 4))
    assert_close(pair_weights(gaps, 3.0, alpha=0.5), vec(math.sqrt(1 / 3), math.sqrt(2 / 3), math.sqrt(2)))


def test_a_gap_of_zero_weighs_nothing() -> None:
    assert pair_weights(vec(0, 4), 2.0, alpha=1).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("gaps", [vec(0, 0), vec(1, 5), vec(math.nan, math.inf)])
def test_alpha_zero_weighs_all_pairs_exactly_one(gaps: Tensor) -> None:
    # also where the mean is 0 and (0/0)^0 would be nan
    assert pair_weights(gaps, 0.0, alpha=0).tolist() == [1.0, 1.0]


def test_weights_of_alpha_one_average_to_one() -> None:
    gaps = vec(0.5, 1.5, 4)
    assert_close(pair_weights(gaps, gaps.mean(), alpha=1).mean(), torch.tensor(1.0, dtype=torch.float64))


def test_loss_by_hand() -> None:
    # margins: 2 * (-1 - -2) - 0.5 = 1.5 and 2 * (-3 - -1) - 0.5 = -4.5
    # -log sigmoid(1.5) = log(1 + e^-1.5) = 0.2014132779827524; -log sigmoid(-4.5) = log(1 + e^4.5) = 4.511047744848594
    # (0.5 * 0.20141328 + 1.5 * 4.51104774) / 2 = 3.4336391281321337
    loss = spa_loss(vec(-1, -3), vec(-2, -1), vec(0.5, 1.5), beta=2.0, gamma=0.5, num_pairs=2)
    assert float(loss) == pytest.approx(3.4336391281321337, rel=1e-14)


def test_loss_is_log_two_at_zero_margin() -> None:
    # 2 * (-1.0 - -1.5) - 1 = 0 and -log sigmoid(0) = log 2
    loss = spa_loss(vec(-1.0), vec(-1.5), vec(1), beta=2.0, gamma=1.0, num_pairs=1)
    assert float(loss) == pytest.approx(math.log(2), rel=1e-15)


def test_gradient_by_hand() -> None:
    # dL/dchosen = -w beta sigmoid(-margin) / n; margin 0: -3 * 2 * 0.5 / 4 = -0.75, and +0.75 for the rejected one
    chosen, rejected = vec(-1.0).requires_grad_(), vec(-1.5).requires_grad_()
    spa_loss(chosen, rejected, vec(3), beta=2.0, gamma=1.0, num_pairs=4).backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (float(chosen.grad), float(rejected.grad)) == pytest.approx((-0.75, 0.75), rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_alpha_zero_is_simpo(rows: list[tuple[float, float, float]]) -> None:
    # SimPO (Meng et al., Eq. 6): -mean log sigmoid(beta (chosen - rejected) - gamma), written with log1p(exp)
    chosen, rejected, gaps = (vec(*column) for column in zip(*rows, strict=True))
    margins = [2.5 * (c - r) - 1.0 for c, r, _ in rows]
    simpo = sum(math.log1p(math.exp(-m)) for m in margins) / len(rows)
    ours = spa_loss(chosen, rejected, pair_weights(gaps, 0.0, alpha=0), beta=2.5, gamma=1.0, num_pairs=len(rows))
    assert float(ours) == pytest.approx(simpo, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(pairs, st.integers(0, 8))
def test_splitting_a_batch_does_not_change_the_sum(rows: list[tuple[float, float, float]], cut: int) -> None:
    chosen, rejected, gaps = (vec(*column) for column in zip(*rows, strict=True))
    mean, n = float(gaps.mean()) or 1.0, len(rows)

    def share(part: slice) -> float:
        weights = pair_weights(gaps[part], mean, alpha=1.5)
        return float(spa_loss(chosen[part], rejected[part], weights, beta=2.5, gamma=1.0, num_pairs=n))

    assert share(slice(cut)) + share(slice(cut, None)) == pytest.approx(share(slice(None)), rel=1e-12, abs=1e-14)


def test_extreme_margins_stay_finite() -> None:
    # -log sigmoid(-m) -> m for large m: 1000 * 10 = 10000; and 0 for the right order
    assert float(spa_loss(vec(-10), vec(0), ones(1), beta=1000.0, gamma=0.0, num_pairs=1)) == pytest.approx(10_000)
    assert float(spa_loss(vec(0), vec(-10), ones(1), beta=1000.0, gamma=0.0, num_pairs=1)) == 0.0
