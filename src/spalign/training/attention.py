"""Attention over groups packed into one row: a prompt once, then each of its responses, which sees the prompt and itself.

Everything but attention works token by token, so a packed row costs it no padding and no prompt twice. For attention alone the tokens are
laid out in rows (a response behind its prompt) that plain causal kernels take, and its outputs are put back: no mask of all against all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spalign.engines.attention import grouped_attention
from spalign.training.causal import SHORT, causal_attention
from spalign.training.flex import attend

NAME = "spalign_grouped_sdpa_training"


def lay_out(spans: Sequence[tuple[range, Sequence[range]]]) -> dict[str, Any]:
    """Where attention finds its rows in the packed tokens. spans: for each group its prompt's and its responses' places.

    `blocks`: one or two of {queries (rows, q), keys (rows, k), mask (rows, 1, q, k) or none where a row is plainly causal}, indices of
    packed tokens. `back` (tokens,): for each packed token its place among the outputs of all blocks. A prompt is repeated before each of
    its responses where that is cheaper than a mask, that is where prompts are short; `again`: the places of these copies, `of`: their
    tokens.
    """
    repeated = sum((len(p) + len(r)) ** 2 / 2 for p, rs in spans for r in rs)
    shared = sum(len(p) ** 2 / 2 + sum(len(r) * (len(p) + len(r)) for r in rs) for p, rs in spans)
    rows = [[*p, *r] for p, rs in spans for r in rs]
    blocks: list[dict[str, Tensor]]
    if repeated <= 1.5 * shared:
        whole = _pad(rows)
        blocks = [{"queries": whole, "keys": whole}]
    else:
        prompts, tails = _pad([list(p) for p, _ in spans]), _pad([list(r) for _, rs in spans for r in rs])
        heads = _pad([list(p) for p, rs in spans for _ in rs])
        lengths = torch.tensor([len(p) for p, rs in spans for _ in rs])
        sees_prompt = (torch.arange(heads.shape[1]) < lengths[:, None])[:, None, None].expand(-1, 1, tails.shape[1], -1)
        sees_tail = torch.ones(tails.shape[1], tails.shape[1], dtype=torch.bool).tril().expand(len(tails), 1, -1, -1)
        mask = torch.cat([sees_prompt, sees_tail], -1)
        blocks = [{"queries": prompts, "keys": prompts}, {"queries": tails, "keys": torch.cat([heads, tails], -1), "mask": mask}]
    return {"blocks": blocks, "back": _back(spans, blocks), **(_copies(spans, blocks[0]["queries"]) if len(blocks) == 1 else {})}


def _pad(rows: list[list[int]]) -> Tensor:
    """(rows, longest): short rows go on with token 0, which stands behind all that count and is read by none of them."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def _back(spans: Sequence[tuple[range, Sequence[range]]], blocks: list[dict[str, Tensor]]) -> Tensor:
    back = torch.empty(sum(len(p) + sum(map(len, rs)) for p, rs in spans), dtype=torch.long)
    width = blocks[-1]["queries"].shape[1]
    whole, prompts = len(blocks) == 1, blocks[0]["queries"]
    row, base = 0, 0 if whole else prompts.numel()
    for i, (p, rs) in enumerate(spans):
        at = row * width if whole else i * prompts.shape[1]
        back[p.start : p.stop] = torch.arange(at, at + len(p))
        for r in rs:
            at = base + row * width + (len(p) if whole else 0)
            back[r.start : r.stop] = torch.arange(at, at + len(r))
            row += 1
    return back


def _copies(spans: Sequence[tuple[range, Sequence[range]]], rows: Tensor) -> dict[str, Tensor]:
    again: list[int] = []
    of: list[int] = []
    row = 0
    for p, rs in spans:
        for copy in range(row + 1, row + len(rs)):
            again += range(copy * rows.shape[1], copy * rows.shape[1] + len(p))
            of += p
        row += len(rs)
    return {"again": torch.tensor(again, dtype=torch.long), "of": torch.tensor(of, dtype=torch.long)}


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, tokens, dim); key, value: (1, kv heads, tokens, dim). Returns (1, tokens, heads, dim).

    packed: what `lay_out` or `flex.mark` says, and `positions` (tokens,). Without it this is the attention that engines use.
    """
    if packed is None:
        return grouped_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    window = kwargs.get("sliding_window")
    if "branch" in packed:
        return attend(query, key, value, packed, scaling=scaling, window=window).transpose(1, 2), None
    outputs = []
    for block in packed["blocks"]:
        q, (k, v) = _rows(query, block["queries"], packed), (_rows(x, block["keys"], packed) for x in (key, value))
        mask = block.get("mask")
        if window is not None and block["keys"].shape[1] > window:
            mask = _windowed(mask, packed["positions"], block, window)
        if mask is None and not dropout and q.device.type == "cpu" and q.shape[2] <= SHORT:
            kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
            with torch.autocast("cpu", enabled=False):
                out = causal_attention(q.to(kind), k.to(kind), v.to(kind), scaling or q.shape[-1] ** -0.5).transpose(1, 2)
        else:
            out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, dropout=dropout, is_causal=mask is None)
        outputs.append(out.flatten(0, 1))  # (rows * q, heads, dim)
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    heads, dim = joined.shape[1:]
    tokens: Tensor = _Back.apply(joined.reshape(-1, heads * dim), packed["back"])  # type: ignore[no-untyped-call]
    return tokens.view(1, -1, heads, dim), None


def _rows(x: Tensor, index: Tensor, packed: dict[str, Any]) -> Tensor:
    """(1, heads, tokens, dim), (rows, width) -> (rows, heads, width, dim). Whole tokens are copied, which is quick both ways."""
    _, heads, tokens, dim = x.shape
    flat, places = x[0].transpose(0, 1).reshape(tokens, heads * dim), index.reshape(-1)
    if "again" in packed:
        picked: Tensor = _Rows.apply(flat, places, *(packed[n] for n in ("back", "again", "of")))  # type: ignore[no-untyped-call]
    else:
        picked = flat.index_select(0, places)
    return picked.view(*index.shape, heads, dim).transpose(1, 2)


class _Rows(torch.autograd.Function):
    """`index_select` of tokens into rows. Its gradient would be added token by token, which is slow; here one place of each token is read,
    and only the prompts' copies are added. Places behind a short row have no gradient: nothing that counts sees them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor, back: Tensor, again: Tensor, of: Tensor) -> Tensor:
        ctx.save_for_backward(back, again, of)
        return tokens.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, again, of = ctx.saved_tensors
        return grad.index_select(0, back).index_add_(0, of, grad.index_select(0, again)), None, None, None, None


class _Back(torch.autograd.Function):
    """`index_select` of places none of which is taken twice, so that the gradient is copied, not added."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.places = len(rows)
        return rows.index_select(0, back)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, grad.shape[1]).index_copy_(0, back, grad), None


def _windowed(mask: Tensor | None, positions: Tensor, block: dict[str, Tensor], window: int) -> Tensor:
    ahead = positions[block["queries"]][:, None, :, None] - positions[block["keys"]][:, None, None, :]
    if mask is None:
        q = block["queries"].shape[1]
        mask = torch.ones(q, q, dtype=torch.bool, device=ahead.device).tril()[None, None]
    seen = mask & (ahead < window)
    # places behind a short row may see nothing; they are nobody's output, but a softmax of nothing is no number
    return seen | ~seen.any(-1, keepdim=True)


def register() -> str:
    """Make the attention known to transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
