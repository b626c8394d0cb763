"""Evaluation: what changed on held-out prompts."""

from spalign.evaluation.agreement import agreement
from spalign.evaluation.compare import Check, Comparison, compare
from spalign.evaluation.metrics import Interval, bootstrap_mean, refused, repetition

__all__ = ["Check", "Comparison", "Interval", "agreement", "bootstrap_mean", "compare", "refused", "repetition"]
