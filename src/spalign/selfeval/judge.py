"""How a model judges: per objective the scorer, and the calibration that puts its raw values on 0-10. Stored as judge.yaml."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from spalign.errors import ConfigError
from spalign.selfeval.base import Raw
from spalign.selfeval.probe import Probe
from spalign.store import write_atomic
from spalign.types import SCORE_MAX
from spalign.yamlfile import build, load_yaml

KNOWN = ("likert", "likert_expected", "yes_no_zero", "yes_no", "contrastive", "pmi", "probe", "pairwise", "ensemble")
Verdict = Literal["trustworthy", "weak", "at chance"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(_Part):
    """raw -> 0..10, increasing and the same for every answer.

    logistic: 10 * sigmoid(slope * (raw - centre)). Fitted on labelled answers it is ten times the probability that people call the answer
    good. identity: raw is on 0..10 already.
    """

    kind: Literal["logistic", "identity"] = "logistic"
    slope: Annotated[float, Field(gt=0)] = 1.0
    centre: float = 0.0

    def score(self, raw: Raw) -> float:
        return (
            min(max(raw.value, 0.0), SCORE_MAX) if self.kind == "identity" else SCORE_MAX * sigmoid(self.slope * (raw.value - self.centre))
        )

    def spread(self, raw: Raw) -> float:
        """Half the width, in score points, of the raw value plus and minus its standard deviation."""
        above, below = (self.score(Raw(raw.value + s, 0.0)) for s in (raw.spread, -raw.spread))
        return (above - below) / 2


UNCALIBRATED = {
    "likert": Calibration(kind="identity"),
    "likert_expected": Calibration(kind="identity"),
    "contrastive": Calibration(slope=10.0),  # nats a token; tenths of them are much
    "pmi": Calibration(slope=2.0, centre=0.5),
    "probe": Calibration(slope=3.0),
}
"""Scales of scorers that are named without a check; the others are log-odds, whose scale is the plain logistic one."""


class Member(_Part):
    """A scorer's part in an ensemble: its raw values are standardised by the mean and deviation that they have on the labelled answers."""

    mean: float
    deviation: Annotated[float, Field(gt=0)]


class Judgement(_Part):
    """How one objective is judged. The figures are those of the check, where there was one."""

    scorer: str
    calibration: Calibration = Calibration()
    members: dict[str, Member] = {}
    probe: Probe | None = None
    threshold: Annotated[float, Field(ge=0, le=SCORE_MAX + 0.01)] | None = None  # above the highest score: none is good enough
    """What `threshold: auto` stands for: the score from which an answer counts as good."""
    threshold_ci: tuple[float, float] | None = None
    auc: float | None = None
    """On the kind of labelled answers that the judge is worst at."""
    auc_ci: tuple[float, float] | None = None
    on: str | None = None
    """Which kind that is."""
    asked: str | None = None
    """Digest of what the judge was told of the objective."""
    injection_shift: float | None = None
    verdict: Verdict | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.scorer not in KNOWN:
            raise ValueError(f"no scorer '{self.scorer}'; there are: {', '.join(KNOWN)}")
        if unknown := sorted(set(self.members) - set(KNOWN)):
            raise ValueError(f"no scorer '{unknown[0]}' for an ensemble")
        if (self.scorer == "ensemble") != bool(self.members):
            raise ValueError("an ensemble, and nothing else, has members")
        return self

    @classmethod
    def unchecked(cls, scorer: str) -> Judgement:
        """A scorer named by the user: on its own scale, without a threshold."""
        return cls(scorer=scorer, calibration=UNCALIBRATED.get(scorer, Calibration()))


class JudgeFile(_Part):
    """judge.yaml: what `spalign judge-check` found for one model."""

    model: str
    fingerprint: str
    rows: str
    """SHA-256 of the labelled rows."""
    objectives: dict[str, Judgement]


def load_judge(path: Path) -> JudgeFile:
    """Raises ConfigError with all mistakes of the file at once."""
    data, lines = load_yaml(path, ConfigError)
    return build(JudgeFile, data, source=str(path), lines=lines, error=ConfigError)


def save_judge(path: Path, judge: JudgeFile) -> None:
    text = yaml.safe_dump(_plain(judge.model_dump(mode="json", exclude_none=True)), sort_keys=False, allow_unicode=True)
    write_atomic(path, text.encode())


def _plain(value: Any) -> Any:
    """Numbers to six significant digits: more would pretend."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
