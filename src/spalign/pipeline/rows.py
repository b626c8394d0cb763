"""Rows of the stages as the stages after them read them: only what is looked at is decoded, the rest stays as it stands in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from spalign.errors import RunFolderError
from spalign.store import Row
from spalign.types import Response

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredResponse(Response):
    """A response whose tokens are left as JSON: a prompt of the run has hundreds of them, and denoising looks at none."""

    token_ids: msgspec.Raw  # type: ignore[assignment]

    @property
    def tokens(self) -> bytes:
        """The token ids as JSON."""
        return bytes(self.token_ids)

    @property
    def length(self) -> int:
        """How many tokens."""
        tokens = self.tokens
        return tokens.count(b",") + (tokens.strip(b" []") != b"")


class StoredPrompt(msgspec.Struct):
    id: str
    messages: msgspec.Raw
    topic: str = ""
    intent: str = ""


class StoredGroup(msgspec.Struct):
    """A row of 2-evaluate."""

    prompt: StoredPrompt
    candidates: tuple[StoredResponse, ...]
    prompt_ids: msgspec.Raw = msgspec.Raw(b"[]")

    @property
    def encoded(self) -> bool:
        """Whether the prompt's tokens are there: not in rows that an earlier version of spalign made."""
        return bytes(self.prompt_ids) != b"[]"


class StoredDrafts(msgspec.Struct):
    """A row of 3-refine."""

    prompt_id: str
    refined: tuple[StoredResponse, ...]
    placebo: tuple[StoredResponse, ...] = ()


class StoredVerdict(msgspec.Struct):
    """A row of 4-denoise. reason: None for a kept group; refined, placebo: ids of the drafts that were chosen."""

    prompt_id: str
    reason: str | None
    det: float | None
    detail: str
    refined: str | None
    placebo: str | None


group_decoder = msgspec.json.Decoder(StoredGroup)
drafts_decoder = msgspec.json.Decoder(StoredDrafts)
verdict_decoder = msgspec.json.Decoder(StoredVerdict)


def read_row(decoder: msgspec.json.Decoder[T], line: bytes) -> T:
    """A line of a part; half surrogate pairs, which no tokenizer takes, are read as question marks. Raises RunFolderError."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        return decoder.decode(line.decode("utf-8", "surrogatepass").encode("utf-8", "replace"))
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise RunFolderError(f"a row of the run cannot be read: {e}", hint="was it made by an earlier version? --fresh begins anew") from e


def pair_row(group: StoredGroup, prompt_ids: object, chosen: StoredResponse, rejected: StoredResponse, **figures: object) -> Row:
    """A pair as a row of TRL's conversational preference format, with extra columns; figures: margin, gap, weight, decided_by."""
    return {
        "id": f"{chosen.id}>{rejected.id}",
        "prompt_id": group.prompt.id,
        "topic": group.prompt.topic,
        "intent": group.prompt.intent,
        "prompt": group.prompt.messages,
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "scores_chosen": chosen.scores,
        "scores_rejected": rejected.scores,
        **figures,
        "prompt_ids": prompt_ids,
        "chosen_ids": chosen.token_ids,
        "rejected_ids": rejected.token_ids,
    }
