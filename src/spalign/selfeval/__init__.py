"""Self-evaluation: a model scores answers, objective by objective, on 0-10, higher is better; and what those scores are worth."""

from spalign.selfeval.base import Case, Raw, Scorer
from spalign.selfeval.check import check_askable, judge_check
from spalign.selfeval.evaluate import ENSEMBLE, SCORERS, all_scorers, cases_of, check_scorers, is_relative, score_groups, score_responses
from spalign.selfeval.judge import JudgeFile, Judgement, load_judge, save_judge
from spalign.selfeval.labelled import LabelledCase, fingerprint, load_labelled, shipped_objectives
from spalign.selfeval.likert import parse_score
from spalign.selfeval.probe import PROBE, Probe
from spalign.selfeval.report import LOWER_BOUND, JudgeCheck, ScorerReport

__all__ = [
    "ENSEMBLE",
    "LOWER_BOUND",
    "PROBE",
    "SCORERS",
    "Case",
    "JudgeCheck",
    "JudgeFile",
    "Judgement",
    "LabelledCase",
    "Probe",
    "Raw",
    "Scorer",
    "ScorerReport",
    "all_scorers",
    "cases_of",
    "check_askable",
    "check_scorers",
    "fingerprint",
    "is_relative",
    "judge_check",
    "load_judge",
    "load_labelled",
    "parse_score",
    "save_judge",
    "score_groups",
    "score_responses",
    "shipped_objectives",
]
