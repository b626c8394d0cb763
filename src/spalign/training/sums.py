"""What is added up over micro-batches and ranks: what a loss divides by, and the metrics of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spalign.training.groups import TrainingGroup


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Over the whole optimiser step: all micro-batches and ranks."""

    pairs: float
    mean_gap: float
    chosen_tokens: float
    """Of distinct chosen responses."""
    pair_tokens: float
    """Of the pairs' chosen responses, one that stands in three pairs three times."""

    @classmethod
    def of(cls, sums: Sequence[float] | Tensor) -> StepTotals:
        """From what `counted` counts."""
        pairs, gap, once, each = (float(x) for x in sums)
        return cls(pairs, gap / pairs if gap > 0 else 1.0, once, each)


def counted(batches: Sequence[dict[str, Any]]) -> Tensor:
    """(4,): pairs, their gaps, tokens of distinct chosen responses, tokens of the pairs' chosen responses."""
    out = torch.zeros(4, dtype=torch.float64)
    for b in batches:
        count = torch.bincount(b["owner"])
        once, each = count[b["chosen"].unique()].sum(), count[b["chosen"]].sum()
        out += torch.tensor([len(b["gaps"]), b["gaps"].double().sum(), once, each], dtype=torch.float64)
    return out


def counted_groups(groups: Sequence[TrainingGroup]) -> Tensor:
    """The same of groups, before they are made batches of."""
    pairs = [(p.gap, len(g.responses[p.chosen])) for g in groups for p in g.pairs]
    once = sum(len(g.responses[i]) for g in groups for i in {p.chosen for p in g.pairs})
    return torch.tensor([len(pairs), math.fsum(gap for gap, _ in pairs), once, sum(n for _, n in pairs)], dtype=torch.float64)


def pair_sums(logps: Tensor, count: Tensor, inputs: dict[str, Any]) -> Tensor:
    """(7,), what `pair_metrics` makes means of."""
    chosen, rejected = (logps[inputs[side]] for side in ("chosen", "rejected"))
    tokens = (count[inputs[side]].sum().float() for side in ("chosen", "rejected"))
    right = (chosen > rejected).sum().float()
    pairs = torch.tensor(float(len(chosen)), device=logps.device)
    return torch.stack([right, (chosen - rejected).sum(), chosen.sum(), rejected.sum(), *tokens, pairs])


def pair_metrics(sums: Sequence[float]) -> dict[str, float]:
    names = ("pairs/accuracy", "pairs/margin", "logps/chosen", "logps/rejected", "length/chosen", "length/rejected")
    *of_pairs, pairs = sums
    return {name: value / pairs for name, value in zip(names, of_pairs, strict=True)}
