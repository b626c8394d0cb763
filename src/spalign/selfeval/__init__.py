"""Self-evaluation: the policy scores responses, objective by objective, on 0-10, higher is better."""

from spalign.selfeval.evaluate import SCORERS, Scorer, check_scorers, score_groups, score_responses
from spalign.selfeval.likert import LikertScorer, parse_score
from spalign.selfeval.yes_no import CHOICES, YesNoScorer

__all__ = ["CHOICES", "SCORERS", "LikertScorer", "Scorer", "YesNoScorer", "check_scorers", "parse_score", "score_groups", "score_responses"]
