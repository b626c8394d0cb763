"""From text to token ids: conversations by the chat template, answers as turns; nothing in them reads as a special token."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from spalign.engines.base import Ask, Completion, GenerateRequest
from spalign.engines.prefix_tree import Tokens
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
        self._turn = threading.Lock()
        # answers are judged and trained on, not what is thought before them
        self._how = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
        self.eos = {int(i) for i in (*eos, tokenizer.eos_token_id) if i is not None}
        if not self.eos:
            raise ModelError(f"{tokenizer.name_or_path}: no end-of-sequence token", hint="set tokenizer.eos_token and save the tokenizer")
        # all_special_tokens lacks those that have no role of their own, such as Llama 3's <|start_header_id|>
        added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted({*tokenizer.all_special_tokens, *added} - {""})

    def _ids(self, text: str, **how: Any) -> list[int]:
        """One call at a time: the tokenizer keeps the last call's way with special tokens, and threads would take each other's."""
        with self._turn:
            return list(self.tokenizer(text, **how)["input_ids"])

    def chat(self, messages: Sequence[Message], *, thinking: bool = False) -> list[int]:
        """The conversation with the assistant's turn opened. thinking: as the template has it where nobody says anything."""
        turns = [{"role": m.role, "content": self.defused(m.content)} for m in messages]
        how: dict[str, Any] = {} if thinking else self._how
        try:
            with self._turn:
                ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False, **how)
                return list(ids)
        except Exception as e:  # jinja raises what the template asks it to
            raise ModelError(
                f"the chat template refused the conversation: {e}",
                hint="some models take no system turn; see the constitution's system_variants",
            ) from e

    def text(self, text: str) -> list[int]:
        """Plain text by itself: nothing is put around it."""
        return self._ids(self.defused(text), add_special_tokens=False)

    def ask(self, text: str) -> list[int]:
        """A text to be continued, as it stands: what reads like a special token is split into plain text."""
        return self._ids(text, split_special_tokens=True)

    def response(self, text: str) -> list[int]:
        """`text` as an assistant's complete turn, the token that ends it included: the template's, where the model stops at it."""
        return [*self.text(text), self._end]

    @cached_property
    def _end(self) -> int:
        with self._turn:
            _, ids = end_of_turn(self.tokenizer)
        if len(ids) == 1 and ids[0] in self.eos:
            return ids[0]
        return int(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id is not None else min(self.eos)

    def one(self, choice: str, *, chat: bool) -> int:
        """The token that `choice` is, after text or at the start of a turn. Raises EngineError where it is not one."""
        # as it stands after text: some tokenizers give a lone word one more token
        lead = "\n" if chat else "Answer:"
        before, ids = (self._ids(t, add_special_tokens=False) for t in (lead, f"{lead}{choice}"))
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


_MARK = "spalign"


def end_of_turn(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the chat template writes after an assistant's turn, and of that what ends the turn: up to the first special token, else all but
    white space, else, where it writes nothing, EOS."""

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    tail = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(_MARK)[2]
    ids = plain(tail)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    cut = next((n for n, i in enumerate(ids, 1) if i in special), None)
    return ids, ids[:cut] if cut else plain(tail.rstrip()) or [tokenizer.eos_token_id]


class TokenEngine(ABC):
    """What engines that feed token ids to a model do alike. `tokens`: the model's own tokenizer."""

    tokens: ChatTokens

    @property
    @abstractmethod
    def window(self) -> int:
        """Most tokens that prompt and completion may have together."""

    @property
    def tokenizer(self) -> Any:
        return self.tokens.tokenizer

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self.tokens.chat(messages)

    def encode_response(self, text: str) -> list[int]:
        return self.tokens.response(text)

    def check_choices(self, choices: Sequence[str], *, chat: bool = False) -> None:
        for choice in choices:
            self.tokens.one(choice, chat=chat)

    def _work(self, requests: Sequence[GenerateRequest]) -> list[tuple[list[int], GenerateRequest, int]]:
        """Every completion that is wanted, as (prompt, request, index); EngineError where one could exceed the window."""
        encoded = [(self.encode_chat(r.messages), r) for r in requests]
        for ids, request in encoded:
            if len(ids) + request.sampling.max_new_tokens > self.window:
                raise EngineError(
                    f"prompt '{request.id}' has {len(ids)} tokens; with max_new_tokens {request.sampling.max_new_tokens} "
                    f"it exceeds the model's window of {self.window}",
                    hint="shorten or drop the prompt, or lower sample.max_new_tokens",
                )
        return [(ids, r, i) for ids, r in encoded for i in range(len(r.seeds))]

    def _completion(self, request: GenerateRequest, index: int, tokens: Sequence[int]) -> Completion:
        finished = tokens[-1] in self.tokens.eos
        text = self.tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True).strip()
        return Completion(request.id, index, text, tuple(tokens), finished)

    def _encode_ask(self, ask: Ask) -> Tokens:
        if isinstance(ask, str):
            return tuple(self.tokens.ask(ask))
        return tuple(self.encode_chat(ask))

    def _fitting(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tokens, Tokens]]:
        """The distinct requests that fit into the window, neither side empty, in an order of their own: what begins alike is adjacent."""
        return sorted({(tuple(c), tuple(y)) for c, y in requests if c and y and len(c) + len(y) <= self.window})
