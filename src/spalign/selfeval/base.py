"""What a scorer is: a way to ask a model how good an answer is, objective by objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from spalign.constitution import Objective
from spalign.engines.base import Capability, Engine
from spalign.types import Prompt, Response


@dataclass(frozen=True, slots=True)
class Case:
    """An answer to be judged. rivals: the prompt's candidates, which a comparing scorer holds it against."""

    prompt: Prompt
    response: Response
    rivals: tuple[Response, ...] = ()


class Raw(NamedTuple):
    """What a scorer reads off the model, in the scorer's own units, higher is better; spread: its standard deviation, same units."""

    value: float
    spread: float


class Scorer(Protocol):
    """One way to ask. needs: what the engine must be able to do. relative: the scores compare rivals and carry no absolute threshold."""

    name: str
    needs: frozenset[Capability]
    relative: bool

    def check(self, engine: Engine, objectives: Sequence[Objective]) -> None:
        """Raises SpalignError, before any work starts, where `engine` or an objective lacks what this scorer needs."""
        ...

    def score(self, engine: Engine, cases: Sequence[Case], objectives: Sequence[Objective]) -> list[list[Raw | None]]:
        """Per objective, per case; None where the model gives no score, never a default. The cases' responses are not blank."""
        ...
