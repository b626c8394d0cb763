"""A model and its tokenizer, ready on the device, in the precision that is fast there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spalign.config import EngineConfig
from spalign.engines.attention import faithful
from spalign.engines.models import resolve
from spalign.engines.tokens import ChatTokens
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


def load_model(name: str, config: EngineConfig, *, dtype: torch.dtype | Literal["nf4"]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, ready on the device; nf4: in four bits, to be frozen under an adapter. Raises ModelError with what to do."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    where = resolve(name)
    with _device_errors(name, config):
        torch.empty(0, device=device_of(config))  # before weights are read for minutes
    try:
        tokenizer = load_tokenizer(where, trust_remote_code=config.trust_remote_code)
        how = _four_bits(config) if dtype == "nf4" else {"dtype": dtype}
        how |= {"trust_remote_code": config.trust_remote_code, "attn_implementation": None}  # not what its files say
        model = AutoModelForCausalLM.from_pretrained(where, **how, use_safetensors=True)
        if (attention := faithful(model)) != model.config._attn_implementation:
            model.set_attn_implementation(attention)
    except _UNREADABLE as e:
        raise _unreadable(name, e) from e
    if dtype == "nf4":  # it is where it belongs
        keep_backward(model)
        return model, tokenizer
    with _device_errors(name, config):
        return model.to(device_of(config)), tokenizer


def load_tokenizer(where: str, **how: Any) -> Any:
    """The tokenizer of the Hugging Face files. Where `mistral_common` is installed, as vLLM has it, transformers would take Mistral's own
    file, which comes without the chat template."""
    return AutoTokenizer.from_pretrained(where, mistral_format=False, **how)


def load_tokens(name: str, config: EngineConfig) -> tuple[ChatTokens, int | None]:
    """Of a model that another process runs: its tokens, and the longest sequence it is made for (None: not told). Raises ModelError."""
    where = resolve(name)
    try:
        tokenizer = load_tokenizer(where, trust_remote_code=config.trust_remote_code)
        shape = AutoConfig.from_pretrained(where, trust_remote_code=config.trust_remote_code)
        try:
            own = GenerationConfig.from_pretrained(where)
        except OSError:
            own = GenerationConfig.from_model_config(shape)
    except _UNREADABLE as e:
        raise _unreadable(name, e) from e
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return ChatTokens(tokenizer, ends), getattr(shape.get_text_config(), "max_position_embeddings", None)


_UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError)


def _unreadable(name: str, e: Exception) -> ModelError:
    return ModelError(
        f"model '{name}' cannot be loaded: {str(e).splitlines()[0]}",
        hint="check the name, your network and your access to the hub; or use a local folder",
    )


@contextlib.contextmanager
def _device_errors(name: str, config: EngineConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as e:
        raise ModelError(
            f"model '{name}' cannot be put on '{device_of(config)}': {str(e).splitlines()[0]}",
            hint="set engine.device to cpu or a device that is there",
        ) from e


def _four_bits(config: EngineConfig) -> dict[str, Any]:
    """QLoRA's base: NF4 with quantised constants; products, and what is no layer's matrix, in the type that is fast there."""
    need_bitsandbytes()
    kind = inference_dtype(config)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    return {"dtype": kind, "quantization_config": quantized, "device_map": {"": device_of(config)}}


def need_bitsandbytes() -> None:
    """Raises ModelError where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "weights in four bits (train.lora.base_dtype=nf4) need bitsandbytes",
            hint="pip install 'spalign[qlora]', or set train.lora.base_dtype=bfloat16",
        )


def keep_backward(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking four-bit weights for a kernel without a backward pass: it does so when a model is evaluated on a CPU
    with AVX512-BF16, and adapters below its last layers then get no gradient, with no more than a warning. Raises ModelError where it has.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    "the model was evaluated on the CPU, which repacked its four-bit weights: no adapter can be trained on them",
                    hint="load it again, and give it to SPATrainer before anything else runs it",
                )
