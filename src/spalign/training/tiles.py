"""How much there is at a time: of the LM head's logits, on a CPU and elsewhere, for the head itself and for the calculator."""

from __future__ import annotations

TILE = {True: 1 << 25, False: 1 << 27}
"""Logits of one tile (tokens times vocabulary), wide enough for the matrix units: 64 and 256 MB in bf16."""

KEPT = {True: 1 << 28, False: 1 << 30}
"""At most so many logits' gradients (tokens times vocabulary) wait for the backward pass of a trained head: 512 MB and 2 GB in bf16."""

STRETCH = {True: 1 << 19, False: 1 << 27}
"""Logits that are in fp32 at a time: 2 MB, in a CPU's caches, and 512 MB."""


def slices(count: int, size: int) -> list[slice]:
    """All of `count`, `size` at a time."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
