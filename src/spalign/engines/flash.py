"""Attention of continuous batching on GPUs by the flash kernel that PyTorch ships: sequences of any length one after the other.

Without it, transformers takes a mask of all tokens against all cached ones, and most of the work goes into pairs that see nothing of each
other. Its own flash attentions need packages that have to be built, or kernels from the hub.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "spalign_flash_pages"  # "flash": transformers then makes no mask
_WIDEST = 256
_AMPERE = (8, 0)


def attention(  # noqa: PLR0913
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    cache: Any,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, tokens, dim); key, value: (1, kv heads, tokens, dim), the new tokens of all sequences.

    Returns (1, tokens, heads, dim). cache: the pages; they take the new keys and values and give all that the sequences have, one after
    the other. cu_seq_lens_q: (sequences + 1,) where each begins among the tokens. Raises ValueError for soft-capped scores and attention
    sinks.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("the model caps its attention scores or has attention sinks, which PyTorch's flash kernel does not know")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    lengths = (cu_seq_lens_q, kwargs["cu_seq_lens_k"], max_length_q, kwargs["max_length_k"])
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = kernel(*(x[0].transpose(0, 1) for x in (query, key, value)), *lengths, scale=scaling, window_size=window)
    return out.unsqueeze(0), None


def kernel(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **how: Any) -> Tensor:
    """query: (tokens, heads, dim); key, value: (cached and new tokens, kv heads, dim); the last query of a sequence sees its last key."""
    return cast("Tensor", _varlen()(query, key, value, *lengths, **how))


@functools.cache
def _varlen() -> Callable[..., Any]:
    """Told of the groups of heads where it wants to be: torch 2.11 does it unasked."""
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if asks else varlen_attn


def serves(model: Any) -> bool:
    """Whether the kernel can run this model, on this GPU and with this torch."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    takes = model._supports_flash_attn and model._can_set_attn_implementation()
    own = getattr(model, "_compatible_flash_implementations", None)  # such a model takes no other
    known = torch.__version__ >= torch.torch_version.TorchVersion("2.11")
    fits = head_dim % 8 == 0 and head_dim <= _WIDEST
    return bool(takes and own is None and known and fits) and torch.cuda.get_device_capability(model.device) >= _AMPERE


def register() -> str:
    """Make the attention known to transformers; returns its name.

    It goes straight into the model's configuration: asked to set it, transformers looks on the hub for whatever "flash" is part of.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME
