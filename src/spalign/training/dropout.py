"""Dropout off: a policy that drops other units in every pass has log-probabilities of its own in every pass."""

from __future__ import annotations

import torch


def without_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout of the model to 0, of attention too; adapters' stay as they are configured."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():  # transformers hands such a number to the kernel
            if ("dropout" in attribute or attribute.endswith("_pdrop")) and isinstance(value, float):
                setattr(module, attribute, 0.0)
