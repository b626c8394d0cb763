"""Evaluation: what changed on held-out prompts."""

from spalign.evaluation.agreement import agreement
from spalign.evaluation.compare import Check, Comparison, compare, primary_gate
from spalign.evaluation.gate import GateResult, priority_gate
from spalign.evaluation.metrics import Interval, bootstrap_mean, refused, repetition

__all__ = [
    "Check",
    "Comparison",
    "GateResult",
    "Interval",
    "agreement",
    "bootstrap_mean",
    "compare",
    "primary_gate",
    "priority_gate",
    "refused",
    "repetition",
]
