"""Uncertainty-guided SimPO (SPA, Eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_weights(gaps: Tensor, mean_gap: float | Tensor, alpha: float) -> Tensor:
    """w_i = (Delta_i / mean Delta)^alpha (SPA, Eq. 3).

    gaps: (pairs,), Delta_i in score points, >= 0. mean_gap: over all pairs of the whole optimiser step, > 0 unless alpha is 0.
    alpha = 0 gives exactly 1, whatever the gaps are.
    """
    return torch.ones_like(gaps) if alpha == 0 else (gaps / mean_gap) ** alpha


def spa_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, weights: Tensor, *, beta: float, gamma: float, num_pairs: float | Tensor
) -> Tensor:
    """The loss of Eq. 3, a scalar.

    chosen_logps, rejected_logps: (pairs,), mean nats per response token. weights: (pairs,), w_i of Eq. 3.
    num_pairs: pairs in the whole optimiser step, over micro-batches and ranks: splitting a batch must not change the sum.
    """
    margin = beta * (chosen_logps - rejected_logps) - gamma
    return -(weights * F.logsigmoid(margin)).sum() / num_pairs
