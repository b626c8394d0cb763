"""Rollout: responses sampled from the policy, and refined ones."""

from spalign.rollout.clean import clean_refined
from spalign.rollout.refine import Drafts, choose, draft
from spalign.rollout.sample import sample, seed_for

__all__ = ["Drafts", "choose", "clean_refined", "draft", "sample", "seed_for"]
