"""Evaluation: what changed on held-out prompts."""

from spalign.evaluation.agreement import agreement
from spalign.evaluation.assessed import assessed, win_tie_lose
from spalign.evaluation.compare import Check, Comparison, compare, primary_gate
from spalign.evaluation.gate import GateResult, priority_gate
from spalign.evaluation.metrics import Interval, at_equal_length, bootstrap_mean, hh, refused, repetition

__all__ = [
    "Check",
    "Comparison",
    "GateResult",
    "Interval",
    "agreement",
    "assessed",
    "at_equal_length",
    "bootstrap_mean",
    "compare",
    "hh",
    "primary_gate",
    "priority_gate",
    "refused",
    "repetition",
    "win_tie_lose",
]
