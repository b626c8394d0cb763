"""The one thing that flows through the house: a prompt with its responses, each with its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

SCORE_MAX = 10.0
"""Self-scores lie in 0..10, higher is better, for every scorer and objective."""

ILL_MEANT = "ill_meant"
"""The intent of prompts that should be declined; all other intents are safe to help with."""


class DropReason(StrEnum):
    """Why a group left the flow. Every group that leaves has exactly one."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    UNSCORED = "unscored"
    CEILING = "ceiling"
    NOT_DOMINATING = "not dominating"
    UNINFORMATIVE = "uninformative"
    UNSTABLE = "unstable"
    BELOW_MARGIN = "below margin"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's answer: one or more turns, the last one the user's."""

    id: str
    messages: tuple[Message, ...]
    topic: str = ""
    intent: str = ""

    @property
    def text(self) -> str:
        """The conversation as plain text; a single-turn prompt is just the user's words."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n".join(f"{m.role.capitalize()}: {m.content}" for m in self.messages)

    def with_system(self, system: str | None) -> tuple[Message, ...]:
        """The messages under another system prompt (`None`: as they are)."""
        if not system:
            return self.messages
        rest = tuple(m for m in self.messages if m.role != "system")
        return (Message("system", system), *rest)


@dataclass(frozen=True, slots=True)
class Response:
    """One answer of the policy.

    token_ids: what was generated, end-of-sequence token included where there is one; exactly these are trained on.
    finished: the model ended by itself; an unfinished response never enters a pair.
    system: name of the system-prompt variant it was sampled under.
    scores: objective -> 0..10. An objective that could not be scored is absent, never a default.
    spreads: objective -> uncertainty of the score, in score points.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]
    finished: bool
    system: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    spreads: Mapping[str, float] = field(default_factory=dict)

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt with its responses: candidates y^(1..n), the refined y~ and its placebo.

    prompt_ids: the prompt under no system prompt with the assistant's turn opened, as tokens; what the responses are trained
    after; empty where nobody has asked for it.
    """

    prompt: Prompt
    candidates: tuple[Response, ...] = ()
    refined: Response | None = None
    placebo: Response | None = None
    prompt_ids: tuple[int, ...] = ()

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """(x, y, y-) of SPA, Eq. 2.

    margin: sum over objectives of |G(y) - G(y-)|, in score points; what delta is compared with.
    gap: |sum over objectives of G(y) - G(y-)|, in score points; Delta_i of Eq. 3's weight. It can be 0 where the axes disagree.
    decided_by: the first objective in order of priority on which the two differ.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    margin: float
    gap: float
    decided_by: str

    @property
    def id(self) -> str:
        return f"{self.chosen.id}>{self.rejected.id}"


def response_to_json(r: Response) -> dict[str, Any]:
    """A response as plain JSON; `response_from_json` is its inverse."""
    return {
        "id": r.id,
        "text": r.text,
        "token_ids": list(r.token_ids),
        "finished": r.finished,
        "system": r.system,
        "scores": dict(r.scores),
        "spreads": dict(r.spreads),
    }


def group_to_json(g: PromptGroup) -> dict[str, Any]:
    """A group as plain JSON; `group_from_json` is its inverse."""
    return {
        "prompt": {
            "id": g.prompt.id,
            "messages": [{"role": m.role, "content": m.content} for m in g.prompt.messages],
            "topic": g.prompt.topic,
            "intent": g.prompt.intent,
        },
        "prompt_ids": list(g.prompt_ids),
        "candidates": [response_to_json(r) for r in g.candidates],
        "refined": response_to_json(g.refined) if g.refined else None,
        "placebo": response_to_json(g.placebo) if g.placebo else None,
    }


def prompt_from_json(row: Mapping[str, Any]) -> Prompt:
    return Prompt(
        id=row["id"],
        messages=tuple(Message(m["role"], m["content"]) for m in row["messages"]),
        topic=row.get("topic", ""),
        intent=row.get("intent", ""),
    )


def response_from_json(row: Mapping[str, Any] | None) -> Response | None:
    if row is None:
        return None
    return Response(**{**row, "token_ids": tuple(row["token_ids"])})


def group_from_json(row: Mapping[str, Any]) -> PromptGroup:
    return PromptGroup(
        prompt=prompt_from_json(row["prompt"]),
        candidates=tuple(r for r in map(response_from_json, row["candidates"]) if r),
        refined=response_from_json(row["refined"]),
        placebo=response_from_json(row["placebo"]),
        prompt_ids=tuple(row.get("prompt_ids", ())),  # rows of earlier versions have none
    )
