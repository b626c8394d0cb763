"""Batches of groups, and the mean log-probability of every response in them.

`packed`: each group is one stretch of a single row, its prompt once and then each response, which sees the prompt and itself. No padding,
no prompt twice. `padded`: one row a response, for models whose attention is not the plain causal one (sliding windows, recurrent layers,
ALiBi). Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spalign.training.groups import TrainingGroup

Layout = Literal["packed", "padded"]


def collate(groups: Sequence[TrainingGroup], *, layout: Layout, pad: int) -> dict[str, Tensor]:
    """Model inputs and the pairs. Responses are numbered group after group."""
    first, chosen, rejected, gaps = 0, [], [], []
    for g in groups:
        chosen += [first + p.chosen for p in g.pairs]
        rejected += [first + p.rejected for p in g.pairs]
        gaps += [p.gap for p in g.pairs]
        first += len(g.responses)
    inputs = _packed(groups) if layout == "packed" else _padded(groups, pad)
    pairs = {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected), "gaps": torch.tensor(gaps, dtype=torch.float32)}
    return {**inputs, **pairs}


def _packed(groups: Sequence[TrainingGroup]) -> dict[str, Tensor]:
    """One row. `source`: for each response token in order, the position whose output predicts it; `owner`: its response."""
    ids: list[int] = []
    positions: list[int] = []
    stretch: list[int] = []  # which response a position belongs to; a prompt has a number of its own
    home: list[int] = []  # the number of the prompt that a position's stretch hangs on
    source: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    number = response = 0
    for g in groups:
        prompt = number
        number += 1
        ids += g.prompt
        positions += range(len(g.prompt))
        stretch += [prompt] * len(g.prompt)
        home += [prompt] * len(g.prompt)
        last = len(ids) - 1
        for tokens in g.responses:
            source += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
            target += tokens
            owner += [response] * len(tokens)
            ids += tokens
            positions += range(len(g.prompt), len(g.prompt) + len(tokens))
            stretch += [number] * len(tokens)
            home += [prompt] * len(tokens)
            number += 1
            response += 1
    s, h = torch.tensor(stretch), torch.tensor(home)
    sees = (s[:, None] == s[None, :]) | (h[:, None] == s[None, :])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": (sees & torch.ones_like(sees).tril())[None, None],
        "source": torch.tensor(source),
        "target": torch.tensor(target),
        "owner": torch.tensor(owner),
    }


def _padded(groups: Sequence[TrainingGroup], pad: int) -> dict[str, Tensor]:
    """A row a response, padded left, so that responses end together and the last positions are the ones that predict them."""
    rows = [(g.prompt, tokens) for g in groups for tokens in g.responses]
    width, longest = max(len(p) + len(t) for p, t in rows), max(len(t) for _, t in rows)
    mask = torch.tensor([[0] * (width - len(p) - len(t)) + [1] * (len(p) + len(t)) for p, t in rows])
    source = [i * (longest + 1) + longest - len(t) + j for i, (_, t) in enumerate(rows) for j in range(len(t))]
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p) - len(t)) + [*p, *t] for p, t in rows]),
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "attention_mask": mask,
        "source": torch.tensor(source),
        "target": torch.tensor([x for _, t in rows for x in t]),
        "owner": torch.tensor([i for i, (_, t) in enumerate(rows) for _ in t]),
    }


def response_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and number: (responses,) mean nats per token, and (responses,) tokens, by one forward pass.

    The logits are the model's own (its head, scaling and soft-capping), and only at the positions that predict response tokens.
    """
    packed = batch["attention_mask"].dim() == 4
    count = torch.bincount(batch["owner"])
    keep: Any = batch["source"] if packed else int(count.max()) + 1
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat if packed else flat[batch["source"]]
    logps = -torch.nn.functional.cross_entropy(flat.float(), batch["target"], reduction="none")
    total = torch.zeros(len(count), dtype=logps.dtype, device=logps.device).index_add(0, batch["owner"], logps)
    return total / count, count


def layout_for(config: Any) -> Layout:
    """`packed` where attention is plain causal with rotary positions, so that a mask and position ids say it all.

    Only SDPA reads a boolean mask as one: eager attention would add it to the scores, and flash attention takes none.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    sliding = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    plain = kinds == {"full_attention"} and rotary and not sliding and not getattr(text, "alibi", False)
    sdpa = (getattr(text, "_attn_implementation", None) or "sdpa").endswith("sdpa")
    return "packed" if plain and sdpa else "padded"
