"""A model and its tokenizer, ready on the device, in the precision that is fast there."""

from __future__ import annotations

import os

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spalign.config import EngineConfig
from spalign.engines.attention import register
from spalign.engines.models import resolve
from spalign.errors import ModelError


def fast_bf16(device: str) -> bool:
    """Whether bfloat16 is the fast type there: CUDA from Ampere, CPUs with AMX or AVX512-BF16."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    if device != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16") or known.get("bf16"))


def device_of(config: EngineConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def inference_dtype(config: EngineConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if fast_bf16(device_of(config)) else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def load_model(name: str, config: EngineConfig, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready on the device. Raises ModelError with what to do."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    where = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, trust_remote_code=config.trust_remote_code, use_safetensors=True, attn_implementation=register()
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as e:
        raise ModelError(
            f"model '{name}' cannot be loaded: {str(e).splitlines()[0]}",
            hint="check the name, your network and your access to the hub; or use a local folder",
        ) from e
    try:
        return model.to(device_of(config)), tokenizer
    except (RuntimeError, AssertionError) as e:
        raise ModelError(
            f"model '{name}' cannot be put on '{device_of(config)}': {str(e).splitlines()[0]}",
            hint="set engine.device to cpu or a device that is there",
        ) from e
