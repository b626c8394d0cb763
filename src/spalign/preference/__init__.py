"""From scored responses to preference pairs: the order of objectives, denoising, pairs and their weights. Pure functions only."""

from spalign.preference.denoise import (
    Verdict,
    check,
    consistent_yield,
    covariance_det,
    denoise,
    dominates,
    hopeless,
    resolve_tau,
    usable,
    usable_candidates,
)
from spalign.preference.order import best, is_scored, level, levels, met
from spalign.preference.pairs import Selection, make_pairs, select_pairs, weights

__all__ = [
    "Selection",
    "Verdict",
    "best",
    "check",
    "consistent_yield",
    "covariance_det",
    "denoise",
    "dominates",
    "hopeless",
    "is_scored",
    "level",
    "levels",
    "make_pairs",
    "met",
    "resolve_tau",
    "select_pairs",
    "usable",
    "usable_candidates",
    "weights",
]
