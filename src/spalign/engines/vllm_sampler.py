"""Draws in vLLM's worker: each completion from its own seed, as the transformers engine does.

vLLM's seeds are generators whose state moves with every step a request is part of: they fail where prompts run in chunks on a CPU, and
they run one after the other. Here the random number of a token depends on seed and position only, so chunks, preemption and company change
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from spalign.engines.sampling import next_tokens, uniforms

ARGUMENT = "spalign_draw"


@dataclass(slots=True)
class _Row:
    """numbers: one in [0, 1) for every token; so_far: the request's tokens, a list that vLLM extends."""

    numbers: Any
    temperature: float
    top_p: float
    so_far: list[int]


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Chooses the token itself and leaves vLLM, which is greedy, no other choice.

    SamplingParams.extra_args[ARGUMENT]: (seed, temperature, top_p, most tokens). Requests without it are left alone.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: (rows, vocabulary) in float32."""
        for temperature, top_p in dict.fromkeys((r.temperature, r.top_p) for r in self._rows.values()):
            mine = [i for i, r in self._rows.items() if (r.temperature, r.top_p) == (temperature, top_p)]
            u = torch.tensor([self._rows[i].numbers[len(self._rows[i].so_far)] for i in mine], device=logits.device)
            index = torch.tensor(mine, device=logits.device)
            own = logits if mine == list(range(len(logits))) else logits[index]
            logits[index, next_tokens(own, u, temperature=temperature, top_p=top_p)] = torch.finfo(logits.dtype).max
        return logits


def _row(params: Any, _prompt: list[int] | None, so_far: list[int]) -> _Row | None:
    if not (params.extra_args and ARGUMENT in params.extra_args):
        return None
    seed, temperature, top_p, limit = params.extra_args[ARGUMENT]
    return _Row(uniforms(seed, limit), temperature, top_p, so_far)
