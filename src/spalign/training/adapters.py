"""Adapters under autocast: their inputs are not cast twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def cast_inputs_once(model: Any) -> None:
    """Under autocast PEFT turns the input of each adapter into float32, and autocast turns it back at once, in a copy for each adapter.

    Here it stays as it is, so that adapters that have the same input keep one. Without autocast it is cast as PEFT does. Variants of LoRA
    are left alone: DoRA takes its norm in the input's type.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module._cast_input_dtype = partial(_cast, module._cast_input_dtype)


def _cast(own: Callable[..., Tensor], x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is not None and torch.is_autocast_enabled(x.device.type) else own(x, dtype)
