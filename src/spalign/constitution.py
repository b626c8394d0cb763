"""The constitution: what the model is aligned to, as objectives in order of priority."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from spalign.errors import ConstitutionError
from spalign.yamlfile import build, load_yaml

Text = Annotated[str, Field(min_length=1)]


def _yes_no(value: object) -> object:
    """YAML reads a bare `yes` as true; both spellings mean the same answer here."""
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


YesNo = Annotated[Literal["yes", "no"], BeforeValidator(_yes_no)]


def _threshold(value: object) -> object:
    if value == "auto":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 10:
        return float(value)
    raise ValueError("write a score above 0 and at most 10, or auto")


Threshold = Annotated[float | Literal["auto"], PlainValidator(_threshold)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True)


class Exemplar(_Part):
    """A short judged example for the few-shot yes/no question; `answer` answers the objective's question."""

    prompt: Text
    response: Text
    answer: YesNo


class Objective(_Part):
    """One objective.

    principle: what the objective asks of an answer, in plain words (goes into judges' and refiners' prompts).
    question: a yes/no question about an answer; `good_answer` is the answer that a good response gets (its polarity).
    good_system, bad_system: contrasting system prompts, under which a model does and does not follow the principle.
    threshold: scores at or above it count as equal: met is met (0..10; none = more is always better; auto = where labelled answers put it,
    by `spalign judge-check` for the model that judges).
    resolution: absolute bin width on the 0-10 scale; scores in one bin count as equal (none = continuous).
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    principle: Text
    question: Text
    good_answer: YesNo
    exemplars: tuple[Exemplar, ...] = ()
    good_system: Text
    bad_system: Text
    threshold: Threshold | None = None
    resolution: Annotated[float, Field(gt=0, le=10)] | None = None

    @model_validator(mode="after")
    def _both_answers_shown(self) -> Self:
        if self.exemplars and {e.answer for e in self.exemplars} != {"yes", "no"}:
            raise ValueError("the exemplars show one answer only; give at least one 'yes' and one 'no'")
        return self


class SystemVariant(_Part):
    """A system prompt for diverse sampling; an empty text means the bare prompt."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    text: str = ""


class Constitution(_Part):
    """Objectives in order of priority (any number k >= 1), and how to sample and refine under them."""

    name: Text
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)]
    system_variants: Annotated[tuple[SystemVariant, ...], Field(min_length=1)] = (SystemVariant(name="plain"),)
    refine_instruction: Text

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        for what, names in (
            ("objective", [o.name for o in self.objectives]),
            ("system variant", [v.name for v in self.system_variants]),
        ):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"{what} names must differ; these stand twice: {', '.join(twice)}")
        return self

    @property
    def objective_names(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.objectives)

    @property
    def good_system(self) -> str:
        """The system prompt of the principled refinement: every objective's good one, in order of priority."""
        return "\n".join(o.good_system for o in self.objectives)

    @property
    def principles(self) -> str:
        """The principles as a numbered list in order of priority."""
        return "\n".join(f"{i}. {o.name.capitalize()}: {o.principle}" for i, o in enumerate(self.objectives, 1))

    def bare(self) -> Constitution:
        """The same without system-prompt variants: the bare prompt, as in training and evaluation."""
        return self.model_copy(update={"system_variants": (SystemVariant(name="plain"),)})

    def sha256(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def shipped() -> tuple[str, ...]:
    """Names of the constitutions in the package."""
    return tuple(
        sorted(f.name.removesuffix(".yaml") for f in files("spalign").joinpath("constitutions").iterdir() if f.name.endswith(".yaml"))
    )


def load_constitution(name_or_path: str) -> Constitution:
    """A shipped constitution by name, or a YAML file by path.

    Raises ConstitutionError with all mistakes at once, each with its line and what to do.
    """
    if name_or_path in shipped():
        path = Path(str(files("spalign").joinpath("constitutions", f"{name_or_path}.yaml")))
    else:
        path = Path(name_or_path)
        if not path.suffix and not path.exists():
            raise ConstitutionError(
                f"no constitution '{name_or_path}'", hint=f"give a path to a YAML file, or one of: {', '.join(shipped())}"
            )
    data, lines = load_yaml(path, ConstitutionError)
    return build(Constitution, data, source=str(path), lines=lines, error=ConstitutionError)
