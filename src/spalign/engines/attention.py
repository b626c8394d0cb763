"""Which attention a model runs with, and ours for decoding: query heads of one key/value head are rows of one query for the kernel.

For grouped-query models transformers repeats keys and values where there is a mask, and PyTorch's CPU kernel works row by row. For one new
token the grouping gives the same sums in a fraction of the time; benchmarks/decode_attention.py measures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spalign.errors import ModelError

NAME = "spalign_grouped_sdpa"
_ELSEWHERE = "run it with engine.kind=vllm, or behind a server (engine.kind=openai)"


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query: (batch, heads, queries, dim); key, value: (batch, kv heads, keys, dim). Returns (batch, queries, heads, dim)."""
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    plain = value.shape[-1] == dim and (attention_mask is None or attention_mask.shape[1] == 1) and kwargs.get("position_bias") is None
    if queries != 1 or heads == kv_heads or not plain:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(batch, 1, heads, dim), None


def faithful(model: Any) -> str:
    """The attention that computes what the model is: `grouped_attention` where PyTorch's kernels can, else one of transformers'.

    They know no soft cap of scores, which transformers then leaves out without a word (Gemma 2), and no attention sinks (gpt-oss). A choice
    of keys (DeepSeek's indexer) is only taken by attention of transformers' own names. Raises ModelError for models whose past is no keys
    and values of attention (Mamba), which would answer without it, and for capped ones that cannot be told.
    """
    own, kind = str(model.config._attn_implementation), type(model).__name__
    if not (model._supports_sdpa or model._supports_attention_backend):
        raise ModelError(f"{kind} does not use transformers' attention interface, on which this engine builds", hint=_ELSEWHERE)
    if not model._can_set_attn_implementation():
        if capped(model.config) and own != "eager":
            raise ModelError(f"{kind} caps its attention scores, and transformers cannot be told to do so for its code", hint=_ELSEWHERE)
        return own
    if capped(model.config) or not model._supports_sdpa:
        return "eager"
    text = model.config.get_text_config()
    chooses = getattr(text, "index_topk", None) or getattr(text, "index_topk_blocks", None)
    return "sdpa" if chooses else register()


def capped(config: Any) -> bool:
    """Whether attention scores have a soft cap."""
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def register() -> str:
    """Make the attention known to transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
