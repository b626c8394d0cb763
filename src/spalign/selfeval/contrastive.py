"""Likelihood scorers: how much likelier the model finds the answer in one context than in another.

Nothing in the answer is read as an instruction: its own tokens are weighed, so text such as "the score is 10" has nothing to hold on to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from spalign.constitution import Objective
from spalign.engines.base import Capability, Engine, require
from spalign.selfeval.base import Case, Raw
from spalign.types import Message, Prompt

NEUTRAL = Message("user", "Hello!")
"""A turn that asks for nothing: an answer that is as likely after it has nothing to do with the question."""


class ContrastiveScorer:
    """raw = mean over the answer's tokens of log p(token | good system prompt, x) - log p(token | bad system prompt, x), in nats.

    spread: the standard error of that mean.
    """

    name = "contrastive"
    needs: frozenset[Capability] = frozenset({"loglikelihood"})
    relative = False

    def check(self, engine: Engine, objectives: Sequence[Objective]) -> None:
        require(engine, "loglikelihood", f"the scorer '{self.name}'")
        engine.encode_chat((Message("system", "x"), Message("user", "x")))  # some templates take no system turn

    def score(self, engine: Engine, cases: Sequence[Case], objectives: Sequence[Objective]) -> list[list[Raw | None]]:
        """One mean difference per case; None where prompt and answer exceed the model's window."""
        contexts = [[(c.prompt.with_system(o.good_system), self._bad(c.prompt, o)) for c in cases] for o in objectives]
        return _contrasts(engine, cases, contexts)

    def _bad(self, prompt: Prompt, objective: Objective) -> tuple[Message, ...]:
        return prompt.with_system(objective.bad_system)


class PmiScorer(ContrastiveScorer):
    """Pointwise mutual information of prompt and answer: as contrastive, with a greeting in place of the prompt as the bad context.

    raw = mean over the answer's tokens of log p(token | good system prompt, x) - log p(token | good system prompt, "Hello!"), in nats: how
    much of the answer comes from having read the question.
    """

    name = "pmi"

    def _bad(self, prompt: Prompt, objective: Objective) -> tuple[Message, ...]:
        return Message("system", objective.good_system), NEUTRAL


Contexts = tuple[tuple[Message, ...], tuple[Message, ...]]


def _contrasts(engine: Engine, cases: Sequence[Case], contexts: Sequence[Sequence[Contexts]]) -> list[list[Raw | None]]:
    """contexts: per objective, per case, the good and the bad one. All are asked in one call, so that the engine runs equal ones once."""
    answers = [engine.encode_response(c.response.text) for c in cases]
    requests = [
        (engine.encode_chat(context), answer) for pairs in contexts for pair, answer in zip(pairs, answers, strict=True) for context in pair
    ]
    found = iter(engine.loglikelihood(requests))
    return [[_contrast(next(found), next(found)) for _ in cases] for _ in contexts]


def _contrast(good: Sequence[float] | None, bad: Sequence[float] | None) -> Raw | None:
    if good is None or bad is None:
        return None
    leads = [g - b for g, b in zip(good, bad, strict=True)]
    n, mean = len(leads), math.fsum(leads) / len(leads)
    if not math.isfinite(mean):
        return None
    variance = math.fsum((x - mean) ** 2 for x in leads) / max(n - 1, 1)
    return Raw(mean, math.sqrt(variance / n))
