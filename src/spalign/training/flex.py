"""Attention over a packed row by torch's flex attention, on CUDA: one kernel for the whole row, which skips blocks that see nothing.

The other way (`spalign.training.attention`) lays the row out in rows for plain causal kernels, and repeats short prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from spalign.errors import ModelError


def check_device(device: torch.device) -> None:
    """Raises ModelError where flex attention has no backward pass."""
    if device.type != "cuda":
        raise ModelError(
            f"flex attention trains on CUDA, and the model is on '{device.type}': torch has no backward pass for it there",
            hint=_ROWS,
        )


def check_dropout(model: torch.nn.Module) -> None:
    """Raises ModelError where the model drops attention weights in training: flex attention has no dropout."""
    if dropout := max((getattr(module, "attention_dropout", 0) or 0 for module in model.modules()), default=0):
        raise ModelError(f"the model has attention dropout ({dropout}), which flex attention does not know", hint=_ROWS)


_ROWS = "set train.attention=rows (SPAConfig: attention='rows')"


def mark(spans: Sequence[tuple[range, Sequence[range]]]) -> dict[str, Tensor]:
    """`group` and `branch` (tokens,) of each packed token; branch 0 is the prompt. spans: as in `lay_out`."""
    group: list[int] = []
    branch: list[int] = []
    for i, (prompt, responses) in enumerate(spans):
        for j, place in enumerate((prompt, *responses)):
            group += [i] * len(place)
            branch += [j] * len(place)
    return {"group": torch.tensor(group), "branch": torch.tensor(branch)}


def seen(packed: dict[str, Any], window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether one token sees another: itself and what stands before it in its prompt, and of the responses only in its own."""
    group, branch, at = packed["group"], packed["branch"], packed["positions"]

    def sees(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        there: Tensor = (group[q] == group[k]) & ((branch[k] == 0) | (branch[k] == branch[q])) & (at[k] <= at[q])
        return there if window is None else there & (at[q] - at[k] < window)

    return sees


def attend(query: Tensor, key: Tensor, value: Tensor, packed: dict[str, Any], *, scaling: float | None, window: int | None) -> Tensor:
    """query: (1, heads, tokens, dim); key, value: (1, kv heads, tokens, dim). Returns (1, heads, tokens, dim).

    packed: what `mark` says, and `positions`. The mask is made once for all layers with the same window, and kept there.
    """
    masks: dict[int | None, BlockMask] = packed.setdefault("masks", {})
    if window not in masks:
        tokens, device = query.shape[2], query.device
        masks[window] = mask_maker(device.type == "cuda")(seen(packed, window), None, None, tokens, tokens, device=device)
    if torch.is_autocast_enabled(query.device.type):  # positions are turned in float32
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    # for rows shorter than a block torch would choose its kernel for decoding, which finds no configuration for such lengths
    how: Any = {"FORCE_USE_FLEX_ATTENTION": True}
    grouped = key.shape[1] != query.shape[1]
    out: Tensor = kernel()(query, key, value, block_mask=masks[window], scale=scaling, enable_gqa=grouped, kernel_options=how)
    return out


@functools.cache
def mask_maker(compiled: bool) -> Callable[..., BlockMask]:
    """Compiled, it never holds a yes or no for every two tokens."""
    return torch.compile(create_block_mask) if compiled else create_block_mask


@functools.cache
def kernel() -> Any:
    """Rows differ in length from batch to batch: one kernel for all."""
    return torch.compile(flex_attention, dynamic=True)
