"""Self-refinement (SPA, step 3): drafts of one better response a prompt, and a placebo that is made with as much effort.

`principled`: drafts are samples under the constitution's good system prompt. `paper`: drafts are written from the prompt, all
candidates and their scores. The placebo's drafts are ordinary samples. Both are scored like the rest by the caller, and `choose`
takes the best draft of each: a yield of the consistency rule means something only against its placebo.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spalign.config import RefineConfig, SampleConfig
from spalign.constitution import Constitution
from spalign.engines.base import Engine, count_tokens
from spalign.rollout.clean import clean_refined
from spalign.rollout.sample import Ask, ask, sampling_of
from spalign.text import one_line, shorten
from spalign.types import Message, PromptGroup, Response


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of one group, to be scored and then chosen from."""

    refined: tuple[Response, ...]
    placebo: tuple[Response, ...] = ()


def draft(
    engine: Engine, groups: Sequence[PromptGroup], constitution: Constitution, config: RefineConfig, sampling: SampleConfig, *, seed: int
) -> list[Drafts]:
    """Drafts for every group, in order: config.drafts refined ones, and as many placebo ones where config.placebo."""
    how = sampling_of(sampling)
    asks = []
    for group in groups:
        messages = None if config.style == "principled" else (Message("user", paper_prompt(group, constitution)),)
        if messages is not None and count_tokens(engine, messages) + how.max_new_tokens > engine.window:
            continue  # no draft: the group leaves as empty
        asks += [Ask(group.prompt, i, constitution.good_system, config.style, messages) for i in range(config.drafts)]
    refined = ask(engine, asks, how, seed=seed, purpose=f"refined-{config.style}")
    placebo: dict[str, list[Response]] = {}
    if config.placebo:
        variants = constitution.system_variants
        ordinary = [Ask(g.prompt, i, v.text, v.name) for g in groups for i in range(config.drafts) for v in [variants[i % len(variants)]]]
        placebo = ask(engine, ordinary, how, seed=seed, purpose="placebo")
    return [Drafts(tuple(_cleaned(engine, r) for r in refined.get(g.prompt.id, ())), tuple(placebo.get(g.prompt.id, ()))) for g in groups]


def choose(group: PromptGroup, drafts: Drafts, best: Callable[[Sequence[Response]], Response]) -> PromptGroup:
    """The group with its refined response and placebo: `best` of the usable, scored drafts, else the first one, for its drop reason."""

    def pick(options: Sequence[Response]) -> Response | None:
        usable = [r for r in options if r.finished and r.text.strip()]
        most = max((len(r.scores) for r in usable), default=0)
        scored = [r for r in usable if r.scores and len(r.scores) == most]
        return best(scored) if scored else next(iter(usable or options), None)

    return group.replace(refined=pick(drafts.refined), placebo=pick(drafts.placebo))


def paper_prompt(group: PromptGroup, constitution: Constitution) -> str:
    """The refinement prompt of the `paper` style: principles, conversation, every usable candidate with its scores, the instruction."""
    usable = [r for r in group.candidates if r.finished and r.text.strip()]
    shown = "\n".join(f"Answer {i} ({_marks(r, constitution)}): {shorten(one_line(r.text), 1200)}" for i, r in enumerate(usable, 1))
    return (
        f"Principles, the first the most important:\n{constitution.principles}\n\n"
        f"User: {one_line(group.prompt.text)}\n{shown}\n\n{constitution.refine_instruction}"
    )


def _marks(response: Response, constitution: Constitution) -> str:
    return ", ".join(f"{o} {response.scores[o]:.0f}/10" for o in constitution.objective_names if o in response.scores)


def _cleaned(engine: Engine, response: Response) -> Response:
    """The response with its text cleaned; where that changed it, its tokens are those of the new text as a complete turn."""
    text = clean_refined(response.text)
    if text == response.text:
        return response
    return dataclasses.replace(response, text=text, token_ids=tuple(engine.encode_response(text)) if text else ())
