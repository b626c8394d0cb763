"""Attention of continuous batching on GPUs by the flash kernel that PyTorch ships: sequences of any length one after the other.

Without it, transformers takes a mask of all tokens against all cached ones, and most of the work goes into pairs that see nothing of each
other. Its own flash attentions need packages that have to be built, or kernels from the hub.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "spalign_flash_pages"  # "flash": transformers then makes no mask
_WIDEST = 256


def attention(  # noqa: PLR0913
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
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
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # before torch 2.12 it is not asked for
        how["enable_gqa"] = True
    return cast("Tensor", varlen_attn(query, key, value, *lengths, **how))


def serves(model: Any) -> bool:
    """Whether the kernel can run this model: half precision, on CUDA, with heads that it has room for, and a torch that has it."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    here = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    own = getattr(model, "_compatible_flash_implementations", None)  # such a model takes no other
    known = torch.__version__ >= torch.torch_version.TorchVersion("2.10")
    return bool(here and known and head_dim <= _WIDEST and model._supports_flash_attn and own is None)


def register() -> str:
    """Make the attention known to transformers; returns its name for `set_attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME
