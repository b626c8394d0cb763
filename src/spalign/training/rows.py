"""Rows of TRL's preference format as token ids, by the policy's tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from spalign.engines.tokens import end_of_turn
from spalign.errors import DataError
from spalign.training.groups import EncodedRow

PARTS = ("prompt", "chosen", "rejected")
_SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What templates write of a turn beside its content."""


class RowTokens:
    """A tokenizer as training uses it. Raises DataError where it has no end-of-sequence token."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token", hint="set tokenizer.eos_token")
        self._tokenizer = tokenizer

    def text(self, text: str) -> list[int]:
        """A prompt that is plain text, BOS included where the tokenizer writes one."""
        ids = list(self._tokenizer(text)["input_ids"])
        ends = ids[-1:] == [self._tokenizer.eos_token_id] and not text.endswith(self._tokenizer.eos_token)
        return ids[:-1] if ends else ids  # some tokenizers end every text

    def chat(self, turns: list[Any], options: Mapping[str, Any]) -> list[int]:
        """A conversation with the assistant's turn opened, or, where it ends with one, left open."""
        open_ = turns[-1]["role"] == "assistant"
        return self._render(turns, add_generation_prompt=not open_, continue_final_message=open_, **options)

    def after_text(self, text: str) -> list[int]:
        """A completion of plain text, EOS included."""
        ids = self._plain(text)
        return ids if ids[-1:] == [self._tokenizer.eos_token_id] else [*ids, self._tokenizer.eos_token_id]

    def after_chat(self, turn: Mapping[str, Any], turns: list[Any], options: Mapping[str, Any]) -> list[int]:
        """An assistant's turn after `turns`, or the rest of one that they begin, up to the token that ends it.

        Tokens are the template's, where it writes them behind the prompt as it stands (some write turns that are over in another way).
        Raises DataError where it does not and the turn is more than text, as a call of a tool is.
        """
        text = turn["content"] or ""
        begun = turns[-1]["role"] == "assistant"
        full = {**turns[-1], **turn, "content": (turns[-1].get("content") or "") + text} if begun else turn
        prompt, whole = self.chat(turns, options), self._render([*(turns[:-1] if begun else turns), full], **options)
        tail, end = self._end
        follows = whole[: len(prompt)] == prompt and whole[len(whole) - len(tail) :] == tail
        if (more := _beside_text(turn)) and not follows:
            what = ", ".join(more)
            raise DataError(f"the template writes a turn with {what} in a way of its own", hint="give the ids of all three parts")
        ids = whole[len(prompt) : len(whole) - len(tail)] if follows else self._plain(text)
        return ids if ids[len(ids) - len(end) :] == end else [*ids, *end]

    @cached_property
    def _end(self) -> tuple[list[int], list[int]]:
        return end_of_turn(self._tokenizer)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, turns: list[Any], **how: Any) -> list[int]:
        return list(self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **how))


def encode_row(
    row: Mapping[str, Any], index: int, *, tokens: RowTokens, weight_column: str | None = None, margin_column: str | None = None
) -> EncodedRow:
    """A row of TRL's preference format as token ids. Raises DataError where it is none.

    `prompt`/`chosen`/`rejected` are lists of {role, content} turns (conversational; a completion is one turn of the assistant) or plain
    strings. Without `prompt` it is what both sides begin with alike, also where sides are whole conversations and `prompt` is a string.
    `tools` and `chat_template_kwargs` go to the template, and what turns have beside their content (`tool_calls`). Where the row has
    `prompt_ids`, `chosen_ids` or `rejected_ids`, those are taken as they are: what was generated is what is trained on. `gap` is optional;
    columns that are named for weights and margins must be there.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"row {index} is a {type(row).__name__}", hint="rows are mappings with prompt, chosen and rejected")
    name = str(index if row.get("id") is None else row["id"])
    given = [row.get(f"{part}_ids") for part in PARTS]
    parts = [] if None not in given else _encoded(row, name, tokens, given)
    prompt, chosen, rejected = (tuple(own if own is not None else parts[n]) for n, own in enumerate(given))
    numbers = [_number(row, column, name, needed) for column, needed in (("gap", False), (weight_column, True), (margin_column, True))]
    return EncodedRow(prompt, chosen, rejected, numbers[0], name, numbers[1], numbers[2])


def _encoded(row: Mapping[str, Any], name: str, tokens: RowTokens, given: Sequence[Any]) -> list[list[int]]:
    """Ids of the parts that are not given as such, and nothing for the others."""
    prompt, *sides = _parts(row, name, given)
    try:
        turns = [{} if side is None else _turn(side) for side in sides]
        if not isinstance(prompt, list):
            if any(map(_beside_text, turns)):
                raise DataError("a completion is more than text", hint="give the prompt as turns, too")
            texts = [turn.get("content") for turn in turns]
            return [tokens.text(prompt) if prompt is not None else [], *(tokens.after_text(text) if text else [] for text in texts)]
        tools = row.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
        said = (turn if turn.get("content") or _beside_text(turn) else None for turn in turns)
        return [tokens.chat(prompt, options), *(tokens.after_chat(turn, prompt, options) if turn else [] for turn in said)]
    except DataError as e:
        raise DataError(f"row {name}: {e.message}", hint=e.hint) from e
    except Exception as e:  # jinja raises what the template asks it to
        raise DataError(f"row {name}: the chat template refused it: {e}", hint="see which roles, turns and tools the template takes") from e


def _parts(row: Mapping[str, Any], name: str, given: Sequence[Any]) -> tuple[Any, Any, Any]:
    """prompt (text or turns), chosen, rejected; None for what is given as ids."""
    prompt = row.get("prompt")
    chosen, rejected = (row.get(part) if ids is None else None for part, ids in zip(PARTS[1:], given[1:], strict=True))
    for side, part, ids in zip((chosen, rejected), PARTS[1:], given[1:], strict=True):
        if side is None and ids is None:
            raise DataError(f"row {name} has no {part}", hint="rows need prompt, chosen and rejected (TRL's preference format)")
    if given[0] is not None and prompt is None:
        if isinstance(chosen, list) or isinstance(rejected, list):  # a turn follows on turns
            raise DataError(f"row {name} has prompt_ids and turns", hint="give the prompt as turns, too, or all three as ids")
        return None, chosen, rejected
    whole = isinstance(chosen, list) and isinstance(rejected, list) and min(len(chosen), len(rejected)) > 1
    if whole and not isinstance(prompt, list):
        assert chosen and rejected
        n = _alike(chosen[:-1], rejected[:-1])
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    elif prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        n = _alike(chosen, rejected)
        n -= n > 0 and chosen[n - 1] == " "  # a space begins a word
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(t, Mapping) and _says(t) and t.get("role") for t in prompt):
            raise DataError(f"row {name}: the prompt's turns are none", hint="give a list of {role, content} with text in them")
    elif not isinstance(prompt, str):
        what = "has no prompt" if prompt is None else f": prompt is a {type(prompt).__name__}"
        raise DataError(f"row {name} {what}".replace(" :", ":"), hint="give a text or a list of {role, content} turns")
    return prompt, chosen, rejected


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How much both begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _beside_text(turn: Mapping[str, Any]) -> list[str]:
    """What a turn says that is not its content; columns of Arrow have nothing where a turn has none."""
    return [key for key in _SAID if turn.get(key)]


def _says(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content")
    return isinstance(content, str) or (content is None and bool(_beside_text(turn)))


def _turn(side: Any) -> Mapping[str, Any]:
    """A completion as a turn of the assistant."""
    if isinstance(side, str):
        return {"role": "assistant", "content": side}
    if isinstance(side, list) and len(side) == 1 and isinstance(side[0], Mapping) and side[0].get("role") == "assistant" and _says(side[0]):
        return {**side[0], "content": side[0].get("content")}
    raise DataError("a completion must be a string or one assistant turn with text", hint="put earlier turns into the prompt")


def _number(row: Mapping[str, Any], column: str | None, name: str, needed: bool) -> float | None:
    if column is None:
        return None
    value = row.get(column)
    if value is None and not needed:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise DataError(f"row {name}: {column} is {value!r}", hint="give a number >= 0 in every row, or leave the column out") from None
