"""From a model's name and how it is to be run to an engine; what identifies it; and where its weights are."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from spalign.config import EngineConfig
from spalign.engines.base import Engine
from spalign.engines.models import fingerprint, locate
from spalign.errors import ModelError

MERGED = "spalign_merged.json"
"""In an adapter's folder: the fingerprint of the model that it was merged into."""


def load_engine(name: str, config: EngineConfig) -> Engine:
    """The model ready to answer. Raises ModelError or EngineError with what to do."""
    if config.served:
        from spalign.engines.openai import OpenAIEngine

        return OpenAIEngine.load(name, config)
    if config.kind == "vllm":
        from spalign.engines.vllm import VLLMEngine

        base, adapter = adapter_of(name)
        return VLLMEngine(base, config, adapter=adapter, whole=name)
    if config.kind == "ray":
        from spalign.engines.ray import load_ray

        return load_ray(name, config)
    if config.batching == "continuous":
        from spalign.engines.continuous import ContinuousEngine

        return ContinuousEngine.load(name, config)
    from spalign.engines.loading import device_of

    if config.batching == "auto" and device_of(config).startswith("cuda"):
        from spalign.engines.continuous import load_for_gpu

        return load_for_gpu(name, config)
    from spalign.engines.transformers import TransformersEngine

    return TransformersEngine.load(name, config)


def adapter_of(name: str) -> tuple[str, Path | None]:
    """The model that vLLM loads and the adapter that it puts on it: for a model that a run trained as an adapter, its base and that.

    For any other the model itself: where what lies beside it is not the adapter that was merged into it, for DoRA, which vLLM does not
    know, and where the base is not here any more.
    """
    folder = Path(name)
    adapter = folder.with_name(folder.name.replace("model", "adapter", 1))
    if adapter == folder or not (adapter / MERGED).is_file():
        return name, None
    if json.loads((adapter / MERGED).read_text()).get("sha256") != fingerprint(name):
        return name, None
    told = json.loads((adapter / "adapter_config.json").read_text())
    base = str(told["base_model_name_or_path"])
    try:
        locate(base)
    except ModelError:
        return name, None
    return (name, None) if told.get("use_dora") else (base, adapter)


def identify(name: str, config: EngineConfig) -> str:
    """Which model it is, without loading it: the weights, or of a served one its name there and the local model that it is said to be."""
    if not config.served:
        return fingerprint(name)
    local = weights_of(name, config)
    return f"served:{name}" + (f" as {fingerprint(local)}" if local else "")


def weights_of(name: str, config: EngineConfig) -> str | None:
    """The local model or hub id whose weights these are; None for a served model of which nothing is here."""
    if not config.served:
        return name
    wanted = config.tokenizer or name
    try:
        locate(wanted)
    except ModelError:
        if config.tokenizer:
            raise
        return None
    return wanted


def give_memory_back() -> None:
    """What freed models have left to torch on the GPU: another process needs it."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
