"""From a model's name and how it is to be run to an engine; what identifies it; and where its weights are."""

from __future__ import annotations

from spalign.config import EngineConfig
from spalign.engines.base import Engine
from spalign.engines.models import fingerprint, locate
from spalign.errors import ModelError


def load_engine(name: str, config: EngineConfig) -> Engine:
    """The model ready to answer. Raises ModelError or EngineError with what to do."""
    if config.served:
        from spalign.engines.openai import OpenAIEngine

        return OpenAIEngine.load(name, config)
    from spalign.engines.transformers import TransformersEngine

    return TransformersEngine.load(name, config)


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
