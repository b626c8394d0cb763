"""The losses. Each is a sum over this micro-batch divided by what the whole optimiser step has, so that shares of a step add up to it."""

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
    chosen_logps: Tensor, rejected_logps: Tensor, weights: Tensor, *, beta: float, gamma: float | Tensor, num_pairs: float | Tensor
) -> Tensor:
    """Uncertainty-guided SimPO (SPA, Eq. 3), a scalar; plain SimPO where all weights are 1.

    chosen_logps, rejected_logps: (pairs,), mean nats per response token. weights: (pairs,), w_i of Eq. 3.
    gamma: target margin, one for all or (pairs,), absolute (the paper's gamma, not gamma/beta).
    num_pairs: pairs in the whole optimiser step, over micro-batches and ranks: splitting a batch must not change the sum.
    """
    margin = beta * (chosen_logps - rejected_logps) - gamma
    return -(weights * F.logsigmoid(margin)).sum() / num_pairs


def dpo_loss(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    chosen_references: Tensor,
    rejected_references: Tensor,
    weights: Tensor,
    *,
    beta: float,
    num_pairs: float | Tensor,
) -> Tensor:
    """DPO (Rafailov et al. 2023, Eq. 7), a scalar. All logps: (pairs,), summed nats of a response, under the policy and the reference."""
    margin = beta * ((chosen_sums - chosen_references) - (rejected_sums - rejected_references))
    return -(weights * F.logsigmoid(margin)).sum() / num_pairs


def sft_loss(chosen_sums: Tensor, num_tokens: float | Tensor) -> Tensor:
    """Mean negative log-probability a token. chosen_sums: (responses,), summed nats; num_tokens: of the whole optimiser step's."""
    return -chosen_sums.sum() / num_tokens
