"""From text to token ids: conversations by the chat template, answers as turns; nothing in them reads as a special token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from spalign.errors import EngineError, ModelError
from spalign.types import Message


class ChatTokens:
    """A tokenizer with a chat template. Raises ModelError where it has no template or no end-of-sequence token."""

    def __init__(self, tokenizer: Any, eos: Iterable[int | None] = ()) -> None:
        """eos: what else ends a turn, beside the tokenizer's own token."""
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template",
                hint="use an instruct model, or set tokenizer.chat_template and save it",
            )
        self.tokenizer = tokenizer
        self.eos = {int(i) for i in (*eos, tokenizer.eos_token_id) if i is not None}
        if not self.eos:
            raise ModelError(f"{tokenizer.name_or_path}: no end-of-sequence token", hint="set tokenizer.eos_token and save the tokenizer")
        # all_special_tokens lacks those that have no role of their own, such as Llama 3's <|start_header_id|>
        added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted({*tokenizer.all_special_tokens, *added} - {""})

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """The conversation with the assistant's turn opened."""
        turns = [{"role": m.role, "content": self.defused(m.content)} for m in messages]
        try:
            return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
        except Exception as e:  # jinja raises what the template asks it to
            raise ModelError(
                f"the chat template refused the conversation: {e}",
                hint="some models take no system turn; see the constitution's system_variants",
            ) from e

    def text(self, text: str) -> list[int]:
        """Plain text by itself: nothing is put around it."""
        return list(self.tokenizer(self.defused(text), add_special_tokens=False)["input_ids"])

    def response(self, text: str) -> list[int]:
        """`text` as an assistant's complete turn, end-of-sequence token included."""
        return [*self.text(text), self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else min(self.eos)]

    def one(self, choice: str, *, chat: bool) -> int:
        """The token that `choice` is, after text or at the start of a turn. Raises EngineError where it is not one."""
        # as it stands after text: some tokenizers give a lone word one more token
        lead = "\n" if chat else "Answer:"
        before, ids = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (lead, f"{lead}{choice}"))
        ids = ids[len(before) :] if ids[: len(before)] == before else ids
        if len(ids) != 1:
            raise EngineError(
                f"the choice {choice!r} is {len(ids)} tokens for this tokenizer, not one", hint="use the likert scorer for this model"
            )
        return int(ids[0])

    def defused(self, text: str) -> str:
        """`text` in which nothing reads as a special token: a prompt or a response cannot open or close a turn."""
        for token in self._special:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text
