"""From scored responses to preference pairs: the order of objectives, denoising, pairs and their weights. Pure functions only."""

from spalign.preference.denoise import (
    Verdict,
    check,
    consistent_yield,
    covariance_det,
    denoise,
    dominates,
    hopeless,
    passes,
    resolve_tau,
    unstable,
    usable,
    usable_candidates,
)
from spalign.preference.order import best, is_scored, level, levels, met
from spalign.preference.pairs import Selection, capped, longer, make_pairs, pair_places, places_of, select_pairs, unbalanced, weights

__all__ = [
    "Selection",
    "Verdict",
    "best",
    "capped",
    "check",
    "consistent_yield",
    "covariance_det",
    "denoise",
    "dominates",
    "hopeless",
    "is_scored",
    "level",
    "levels",
    "longer",
    "make_pairs",
    "met",
    "pair_places",
    "passes",
    "places_of",
    "resolve_tau",
    "select_pairs",
    "unbalanced",
    "unstable",
    "usable",
    "usable_candidates",
    "weights",
]
