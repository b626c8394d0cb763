"""Reward Soups (Rame et al. 2023): two models that were trained for one objective each, their weights interpolated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from spalign.errors import ModelError
from spalign.store import clear_errors


def soup(first: Path, second: Path, out: Path, *, weight: float) -> Path:
    """Save `weight` x first + (1 - weight) x second as the model `out`, whole or not at all.

    first, second: folders of whole models of one shape (an adapter is merged first: averaging its factors is not averaging what they
    change). weight: 0..1; at 1 and 0 the weights are the endpoint's, bit for bit. The sum is taken in float32 and saved in the first's
    types. Tokenizer and configuration are the first's. Raises ModelError; RunFolderError where `out` cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    if not 0 <= weight <= 1:
        raise ModelError(f"a weight of {weight} is not between 0 and 1", hint="for example 6:4")
    if out.exists():
        raise ModelError(f"{out}: exists", hint="name a new folder; nothing is overwritten")
    a, b = _weights(first), _weights(second)
    if odd := sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name].shape != b[name].shape):
        raise ModelError(
            f"{first} and {second} are not models of one shape: they differ in '{odd[0]}'", hint="both must come from one base"
        )
    mixed: dict[str, Any] = {}
    for name, x in a.items():
        if weight in (0, 1) or not x.is_floating_point():
            mixed[name] = (b if weight == 0 else a)[name].clone()
        else:
            mixed[name] = torch.lerp(b[name].float(), x.float(), weight).to(x.dtype)
    with clear_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        half = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            half.mkdir()
            for file in first.iterdir():
                if file.is_file() and file.suffix not in {".safetensors", ".bin"} and not file.name.endswith(".index.json"):
                    shutil.copy2(file, half / file.name)
            save_file(mixed, half / "model.safetensors", metadata={"format": "pt"})
            half.rename(out)
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return out


def parse_ratio(text: str) -> float:
    """`6:4` as 0.6, `0.6` as itself. Raises ModelError."""
    first, colon, second = text.partition(":")
    try:
        x, y = float(first), float(second) if colon else 1 - float(first)
        if min(x, y) < 0 or not 0 < x + y < float("inf"):
            raise ValueError
    except ValueError:
        raise ModelError(f"'{text}' is no ratio of two weights", hint="for example 6:4 or 0.6") from None
    return x / (x + y)


def _weights(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not the folder of a whole model", hint="of an adapter make one first: spalign merge ADAPTER OUT")
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found: dict[str, Any] = {}
    try:
        for name in names:
            found |= load_file(folder / name)
    except (OSError, SafetensorError) as e:
        raise ModelError(
            f"{folder / name}: cannot be read: {e}", hint="save the model as safetensors; pickled weights are not loaded"
        ) from e
    return found
