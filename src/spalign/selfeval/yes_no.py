"""Yes/no: the log-odds of the good answer to the objective's question; few-shot in plain text, or zero-shot as a chat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spalign.constitution import Exemplar, Objective
from spalign.engines.base import Ask, Capability, Engine, require
from spalign.errors import ConstitutionError
from spalign.selfeval.base import Case, Raw
from spalign.text import one_line
from spalign.types import Message

CHOICES = (" Yes", " No")
LOGISTIC_SD = math.pi / math.sqrt(3)
"""The model's own answer is a draw: yes where the log-odds plus standard logistic noise are positive. This is that noise's deviation."""


class YesNoScorer:
    """raw = +-(log p("Yes") - log p("No")); the sign is the polarity of the objective's question. spread: that of the model's own draw.

    few_shot: the objective's judged exemplars come first, as plain text; an engine reads them once for all answers. Without it the question
    is a chat turn, and an engine reads each answer once for all objectives. reverse: the exemplars in reverse order; what that changes is
    noise.
    """

    needs: frozenset[Capability] = frozenset({"choice_logprobs"})
    relative = False

    def __init__(self, *, few_shot: bool, reverse: bool = False) -> None:
        self.name = "yes_no" if few_shot else "yes_no_zero"
        self._few_shot, self._reverse = few_shot, reverse

    def check(self, engine: Engine, objectives: Sequence[Objective]) -> None:
        require(engine, "choice_logprobs", f"the scorer '{self.name}'")
        if self._few_shot:
            engine.check_choices(CHOICES)
        else:
            engine.check_choices([c.strip() for c in CHOICES], chat=True)
        for o in objectives:
            if self._few_shot and not o.exemplars:
                raise ConstitutionError(
                    f"objective '{o.name}' has no exemplars, which the scorer '{self.name}' needs",
                    hint="add at least one 'yes' and one 'no' exemplar, or use another scorer",
                )

    def score(self, engine: Engine, cases: Sequence[Case], objectives: Sequence[Objective]) -> list[list[Raw | None]]:
        """One log-odds per case; None where the text exceeds the model's window or the model gives no numbers (NaN)."""
        out = []
        for o, found in zip(objectives, self._ask(engine, cases, objectives), strict=True):
            sign = 1.0 if o.good_answer == "yes" else -1.0
            leads = [math.nan if f is None else sign * (f[0] - f[1]) for f in found]
            out.append([Raw(lead, LOGISTIC_SD) if math.isfinite(lead) else None for lead in leads])
        return out

    def _ask(self, engine: Engine, cases: Sequence[Case], objectives: Sequence[Objective]) -> list[list[tuple[float, ...] | None]]:
        asks: list[Ask]
        if self._few_shot:
            shots = {o.name: few_shot_header(o, reverse=self._reverse) for o in objectives}
            asks = [shots[o.name] + _case(c.prompt.text, c.response.text, o.question) for o in objectives for c in cases]
            found = engine.choice_logprobs(asks, CHOICES)
        else:
            asks = [
                (Message("user", _case(c.prompt.text, c.response.text, f"{o.question} Yes or No?")),) for o in objectives for c in cases
            ]
            found = engine.choice_logprobs(asks, [c.strip() for c in CHOICES])
        return [found[n * len(cases) : (n + 1) * len(cases)] for n, _ in enumerate(objectives)]


def few_shot_header(objective: Objective, *, reverse: bool = False) -> str:
    """The judged exemplars, as every case begins."""
    shots = [_judged(e, objective.question) for e in objective.exemplars]
    return "".join(reversed(shots) if reverse else shots)


def _judged(exemplar: Exemplar, question: str) -> str:
    return _case(exemplar.prompt, exemplar.response, question) + f" {exemplar.answer.capitalize()}\n\n"


def _case(prompt: str, response: str, question: str) -> str:
    # One line each: a response that says "\nQuestion: ...\nAnswer: Yes" stays inside its own line.
    return f"User: {one_line(prompt)}\nAssistant: {one_line(response)}\nQuestion: {question}\nAnswer:"
