"""Diverse sampling (SPA, step 1): n responses a prompt at high temperature, under several system prompts in rotation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from spalign.config import SampleConfig
from spalign.constitution import Constitution
from spalign.engines.base import Completion, Engine, GenerateRequest, Sampling
from spalign.types import Message, Prompt, PromptGroup, Response


def seed_for(*parts: object) -> int:
    """A 63-bit seed from what the number is for: the same parts give the same seed, in any process and order."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def sample(
    engine: Engine, prompts: Sequence[Prompt], constitution: Constitution, config: SampleConfig, *, seed: int, purpose: str = "candidate"
) -> list[PromptGroup]:
    """One group a prompt, in order, with config.n candidates; candidate i is drawn under system variant i modulo their number."""
    variants = constitution.system_variants
    asks = [Ask(p, i, v.text, v.name) for p in prompts for i in range(config.n) for v in [variants[i % len(variants)]]]
    responses = ask(engine, asks, sampling_of(config), seed=seed, purpose=purpose)
    return [PromptGroup(p, candidates=tuple(responses[p.id])) for p in prompts]


def sampling_of(config: SampleConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.max_new_tokens)


class Ask:
    """One response that is wanted: the `index`-th for a purpose, under a system prompt or with other messages."""

    __slots__ = ("index", "messages", "prompt", "variant")

    def __init__(self, prompt: Prompt, index: int, system: str, variant: str, messages: tuple[Message, ...] | None = None) -> None:
        self.prompt, self.index, self.variant = prompt, index, variant
        self.messages = messages if messages is not None else prompt.with_system(system)


def ask(engine: Engine, asks: Sequence[Ask], sampling: Sampling, *, seed: int, purpose: str) -> dict[str, list[Response]]:
    """Prompt id -> responses in order of index. Asks with the same messages go as one request, so that they share their prefill."""
    by_messages: dict[tuple[str, tuple[Message, ...]], list[Ask]] = {}
    for a in asks:
        by_messages.setdefault((a.prompt.id, a.messages), []).append(a)
    together = {f"{members[0].prompt.id}#{i}": members for i, members in enumerate(by_messages.values())}
    requests = [
        GenerateRequest(key, members[0].messages, tuple(seed_for(seed, purpose, a.prompt.id, a.index) for a in members), sampling)
        for key, members in together.items()
    ]
    found: dict[str, dict[int, Response]] = {a.prompt.id: {} for a in asks}
    for completion in engine.generate(requests):
        a = together[completion.request_id][completion.index]
        found[a.prompt.id][a.index] = _response(a, purpose, completion)
    return {prompt_id: [by_index[i] for i in sorted(by_index)] for prompt_id, by_index in found.items()}


def _response(a: Ask, purpose: str, completion: Completion) -> Response:
    return Response(f"{a.prompt.id}/{purpose}-{a.index}", completion.text, completion.token_ids, completion.finished, a.variant)
