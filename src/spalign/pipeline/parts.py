"""The parts of 2-evaluate, 3-refine and 4-denoise as they are read together: the same prompts in the same order."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from spalign.constitution import Objective
from spalign.errors import RunFolderError
from spalign.pipeline.context import Policy
from spalign.pipeline.rows import (
    StoredDrafts,
    StoredGroup,
    StoredResponse,
    drafts_decoder,
    group_decoder,
    read_row,
    verdict_decoder,
)
from spalign.pipeline.workers import cores, in_order
from spalign.preference import best, is_scored
from spalign.store import Part, Stage
from spalign.types import Message, Prompt, PromptGroup, Response

T = TypeVar("T")
MANY = 20_000
"""From so many prompts on, several processes do the work."""


def over_parts(function: Callable[[T], Any], tasks: Sequence[T], scored: Stage, *, here: bool = False) -> Iterator[Any]:
    """`function` of every task; by this process alone where it has to be `here`."""
    many = (scored.manifest() or {})["items"] >= MANY
    return in_order(function, tasks, cores() if many and not here else 1)


def best_scored(drafts: Sequence[Response], *, objectives: Sequence[Objective]) -> Response:
    """The best draft that is scored on every objective, else the first, which is then dropped as unscored."""
    if len(drafts) == 1:
        return drafts[0]
    scored = [r for r in drafts if is_scored(r, objectives)]
    return best(scored, objectives) if scored else drafts[0]


def read_groups(scored: Part, refined: Part) -> Iterator[tuple[StoredGroup, StoredDrafts]]:
    """The groups of a part with their drafts."""
    for line, of_drafts in _side_by_side(refined, scored.lines(), refined.lines()):
        group, drafts = read_row(group_decoder, line), read_row(drafts_decoder, of_drafts)
        _check_same(refined, group.prompt.id, drafts.prompt_id)
        yield group, drafts


def kept_groups(
    scored: Part, refined: Part, verdicts: bytes, only: Container[int] | None = None
) -> Iterator[tuple[int, StoredGroup, list[StoredResponse], int | None]]:
    """The groups of a part that denoising kept, with their row, their responses, and which of these is the refined one.

    only: rows of interest; nothing of the others is decoded. The parts were checked when the rows of interest were found.
    """
    rows = (scored.lines(checked=only is not None), refined.lines(checked=only is not None), verdicts.splitlines())
    for n, (line, of_drafts, said) in enumerate(_side_by_side(refined, *rows)):
        if only is not None and n not in only:
            continue
        verdict = read_row(verdict_decoder, said)
        if verdict.reason is None:
            group, drafts = read_row(group_decoder, line), read_row(drafts_decoder, of_drafts)
            _check_same(refined, group.prompt.id, drafts.prompt_id, verdict.prompt_id)
            chosen = [r for r in drafts.refined if r.id == verdict.refined]  # none only where nothing is denoised
            yield n, group, [*group.candidates, *chosen], len(group.candidates) if chosen else None


def _side_by_side(part: Part, *rows: list[bytes]) -> Iterator[tuple[bytes, ...]]:
    if len(set(map(len, rows))) > 1:
        raise RunFolderError(
            f"{part.path}: has not as many rows as the stages beside it", hint=f"remove {part.path.parent} to have the stage done again"
        )
    return zip(*rows, strict=True)


def _check_same(part: Part, *prompt_ids: str) -> None:
    if len(set(prompt_ids)) > 1:
        raise RunFolderError(
            f"{part.path}: is of other prompts than the stages beside it", hint=f"remove {part.path.parent} to have the stage done again"
        )


def group_of(stored: StoredGroup) -> PromptGroup:
    """For denoising, which looks at responses alone."""
    return PromptGroup(Prompt(stored.prompt.id, ()), candidates=stored.candidates)


def encoder(policy: Policy, scored: Stage) -> Callable[[StoredGroup], list[int]] | None:
    """What gives the prompt's tokens where they do not stand in the rows, as in runs of an earlier version; else None."""
    first = next((line for part in scored.finished_parts()[:1] for line in part.lines()), None)
    if first is None or read_row(group_decoder, first).encoded:
        return None

    def encode(group: StoredGroup) -> list[int]:
        messages = msgspec.json.decode(group.prompt.messages, type=tuple[Message, ...])
        return policy.engine.encode_chat(messages)

    return encode
