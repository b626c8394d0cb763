"""Batches of groups, and the mean log-probability of every response in them.

`packed`: each group is one stretch of a single row, its prompt once and then each response. No padding, no prompt twice. `flex`: the same
row, attention by torch's flex attention (CUDA). `padded`: one row a response, for models whose attention is not the plain causal one
(recurrent layers, ALiBi, soft caps). All give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from spalign.engines.attention import NAME as GROUPED_DECODING
from spalign.engines.attention import capped, faithful
from spalign.engines.loading import keep_backward
from spalign.errors import ModelError
from spalign.training.attention import NAME, lay_out, register
from spalign.training.flex import check_device, check_dropout, mark
from spalign.training.groups import TrainingGroup, TrainingPair
from spalign.training.head import add_logps
from spalign.training.norms import fuse_norms

logger = logging.getLogger(__name__)

Layout = Literal["packed", "flex", "padded"]


def collate(groups: Sequence[TrainingGroup], *, layout: Layout, pad: int) -> dict[str, Any]:
    """Model inputs and the pairs. Responses are numbered group after group.

    chosen, rejected: (pairs,) numbers of responses. gaps, and weights, margins where the pairs have them: (pairs,).
    references: (responses,) summed nats under the reference policy, where the groups have them. names: of the pairs. per_group: how many
    pairs each group has.
    """
    first, chosen, rejected = 0, [], []
    for g in groups:
        chosen += [first + p.chosen for p in g.pairs]
        rejected += [first + p.rejected for p in g.pairs]
        first += len(g.responses)
    batch = _padded(groups, pad) if layout == "padded" else _packed(groups, lay_out if layout == "packed" else mark)
    batch |= {
        "chosen": torch.tensor(chosen),
        "rejected": torch.tensor(rejected),
        "names": [p.name or g.name for g in groups for p in g.pairs],
    }
    batch["per_group"] = [len(g.pairs) for g in groups]
    batch["gaps"] = torch.tensor([p.gap for g in groups for p in g.pairs], dtype=torch.float32)
    for name in ("weight", "margin"):
        values = [getattr(p, name) for g in groups for p in g.pairs]
        if None not in values:
            batch[f"{name}s"] = torch.tensor(values, dtype=torch.float32)
    if all(g.references for g in groups):
        batch["references"] = torch.tensor([x for g in groups for x in g.references], dtype=torch.float32)
    return batch


def _packed(groups: Sequence[TrainingGroup], lay_out: Callable[[list[tuple[range, list[range]]]], dict[str, Any]]) -> dict[str, Any]:
    """One row. lay_out: what attention needs to know of it.

    `source`: for each response token in order, the place whose output predicts it; `owner`: its response.
    """
    ids: list[int] = []
    positions: list[int] = []
    source: list[int] = []
    spans: list[tuple[range, list[range]]] = []
    for g in groups:
        prompt = range(len(ids), len(ids) + len(g.prompt))
        ids += g.prompt
        positions += range(len(g.prompt))
        spans.append((prompt, []))
        for tokens in g.responses:
            place = range(len(ids), len(ids) + len(tokens))
            source += [prompt[-1], *place[:-1]]
            ids += tokens
            positions += range(len(g.prompt), len(g.prompt) + len(tokens))
            spans[-1][1].append(place)
    position_ids = torch.tensor([positions])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": position_ids,
        "packed": {**lay_out(spans), "positions": position_ids[0]},
        **_targets(groups, source),
    }


def _padded(groups: Sequence[TrainingGroup], pad: int) -> dict[str, Any]:
    """A row a response, padded at its end, where nothing that counts can see it: no mask."""
    rows = [(g.prompt, tokens) for g in groups for tokens in g.responses]
    width = max(len(p) + len(t) for p, t in rows)
    return {
        "input_ids": torch.tensor([[*p, *t] + [pad] * (width - len(p) - len(t)) for p, t in rows]),
        "position_ids": torch.arange(width).expand(len(rows), -1),
        **_targets(groups, [i * width + len(p) - 1 + j for i, (p, t) in enumerate(rows) for j in range(len(t))]),
    }


def _targets(groups: Sequence[TrainingGroup], source: list[int]) -> dict[str, Tensor]:
    responses = [tokens for g in groups for tokens in g.responses]
    return {
        "source": torch.tensor(source),
        "target": torch.tensor([x for tokens in responses for x in tokens]),
        "owner": torch.tensor([i for i, tokens in enumerate(responses) for _ in tokens]),
    }


def without_groups_after(batch: dict[str, Any], count: int) -> None:
    """Take the pairs of all groups but the first `count` out of a batch: the rest runs along and counts for nothing."""
    pairs = sum(batch["per_group"][:count])
    for part in ("chosen", "rejected", "gaps", "weights", "margins", "names"):
        if part in batch:
            batch[part] = batch[part][:pairs]
    batch["per_group"] = batch["per_group"][:count]


_CHECK = TrainingGroup((3, 7, 4, 9, 5), ((8, 6, 2), (5, 3, 9, 7, 4, 8), (6, 2, 8, 3)), (TrainingPair(0, 1, 1.0),), "check")


def prepare(model: Any, attention: Literal["rows", "flex"] = "rows") -> Layout:
    """Give `model` the attention and the LM head that `response_logps` uses; returns the layout it takes. Generating is as before.

    attention: over a packed row. What is fastest is tried first and held against the model's own logits on a few tokens; what does not
    give the same numbers (an attention that goes its own way, a head that does more than its configuration says) is not used, with a
    warning. Raises ModelError if nothing does, and for `flex` where the model is not on CUDA.
    """
    if getattr(model, "spalign_attention", None) == attention:
        return model.spalign_layout  # type: ignore[no-any-return]
    wanted, own = layout_for(model.config), model.config._attn_implementation
    if capped(model.config) and own == "sdpa":
        own = faithful(model)  # by default transformers leaves the cap out
    if attention == "flex":
        check_device(model.device)
        check_dropout(model)
        wanted = "flex" if wanted == "packed" else wanted
    keep_backward(model)
    if not hasattr(model, "spalign_tiled"):
        add_logps(model)
        fuse_norms(model)
    here = not any(p.is_meta or not p.numel() for p in model.parameters())  # ZeRO-3 has them elsewhere: nothing to check on
    layouts: tuple[Layout, ...] = ("flex", "packed", "padded")
    for layout in layouts[layouts.index(wanted) :]:
        model.set_attn_implementation(own if layout == "padded" else register())
        for model.spalign_tiled in (True, False):
            if not here or _same_numbers(model, layout):
                if (layout, model.spalign_tiled) != (wanted, True):
                    logger.warning(
                        "spalign: %s does more than its configuration says; trained with %s rows%s",
                        type(model).__name__,
                        layout,
                        "" if model.spalign_tiled else " and all logits of response tokens at once",
                    )
                model.spalign_layout, model.spalign_attention = layout, attention
                return layout
    raise ModelError(
        f"{type(model).__name__} gives other log-probabilities in a batch than alone",
        hint="report this model; it cannot be trained on groups",
    )


@torch.no_grad()
def _same_numbers(model: Any, layout: Layout) -> bool:
    training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size

    def spread(tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Over the vocabulary: its first ids are special tokens, between which bf16 log-probabilities are a nat apart in any kernel."""
        return tuple(t * (vocabulary // 10 + 1) % vocabulary for t in tokens)

    group = replace(_CHECK, prompt=spread(_CHECK.prompt), responses=tuple(map(spread, _CHECK.responses)))
    rows = [torch.tensor([[*group.prompt, *r]], device=model.device) for r in group.responses]
    start = len(group.prompt) - 1
    own = torch.stack([_plain_logps(model(input_ids=r, use_cache=False).logits[0, start:-1], r[0, start + 1 :]).mean() for r in rows])
    try:
        means, _ = response_logps(model, moved(collate([group], layout=layout, pad=0), model.device))
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        logger.info("spalign: %s rows do not work for %s: %s", layout, type(model).__name__, e)
        return False
    finally:
        model.train(training)
    exact = all(p.dtype == torch.float32 for p in model.parameters())
    return bool(torch.allclose(means.float(), own, atol=1e-4 if exact else 0.05, rtol=1e-4 if exact else 0.01, equal_nan=True))


def _plain_logps(logits: Tensor, target: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")


def moved(value: Any, device: torch.device) -> Any:
    """All tensors in it, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return [moved(v, device) for v in value] if isinstance(value, list) else value


def response_logps(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and number: (responses,) mean nats per token, and (responses,) tokens, by one forward pass. `model` has been `prepare`d."""
    packed = batch.get("packed")
    # a mask of four dimensions is left alone by the model; attention goes by `packed`
    inputs = {} if packed is None else {"packed": packed, "attention_mask": torch.ones(1, 1, 1, 1, device=batch["source"].device)}
    logps = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        source=batch["source"],
        target=batch["target"],
        **inputs,
    )
    count = torch.bincount(batch["owner"])
    total = torch.zeros(len(count), dtype=logps.dtype, device=logps.device).index_add(0, batch["owner"], logps)
    return total / count, count


def window_of(config: Any) -> int:
    """Tokens that a row may have. With LongRoPE those of the original window: beyond it all rotations change, so that a longer row would
    change what the others of its batch are."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if any(r.get("rope_type") == "longrope" for r in (rope, *rope.values()) if isinstance(r, dict)):
        return int(rope.get("original_max_position_embeddings") or text.original_max_position_embeddings)
    return int(getattr(text, "max_position_embeddings", None) or 1 << 20)


def layout_for(config: Any) -> Layout:
    """`packed` where attention is causal, whole or windowed, with rotary positions, by SDPA: then position ids and `lay_out` say it all."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
    plain = kinds <= {"full_attention", "sliding_attention"} and rotary and not getattr(text, "alibi", False)
    sdpa = (getattr(text, "_attn_implementation", None) or "sdpa") in ("sdpa", NAME, GROUPED_DECODING)
    return "packed" if plain and sdpa and not capped(config) else "padded"
