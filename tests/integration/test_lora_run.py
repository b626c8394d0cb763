"""A run that trains an adapter: what it leaves is PEFT's own format, and one model with what is merged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_pipeline import engine, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from spalign.engines.make import MERGED
from spalign.pipeline import run

FOUR = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'spalign[qlora]'")


@pytest.mark.parametrize("base_dtype", ["auto", "bfloat16", pytest.param("nf4", marks=FOUR)])
def test_plain_peft_gives_the_logits_of_the_merged_model(tmp_path: Path, tiny_model: Path, base_dtype: str) -> None:
    # a rate at which six steps of a rank of 4 are seen; random weights babble, which the guard is not asked about here
    train = {
        "lora": {"r": 4, "base_dtype": base_dtype}, "learning_rate": 2e-3, "prompts_per_step": 2, "epochs": 3,
        "guard": {"prompts": 4, "max_length_ratio": 1000, "max_repetition_rise": 1, "max_kl": 999, "max_chosen_drop": 999},
    }  # fmt: skip
    config = settings(tmp_path, tiny_model, ["keep"] * 4, train=train)
    summary = run(config, make_engine=engine).summary
    assert summary is not None
    assert summary["train"]["lora"]["base_dtype"] == base_dtype
    stage = config.folder / "iteration-1/6-train"
    log = json.loads((stage / "log.json").read_text())
    assert log["result"]["steps"] == 6
    assert log["steps"][-1]["loss"] < 0.9 * log["steps"][0]["loss"]
    assert not (stage / "checkpoints").exists()

    names = {p.name for p in (stage / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", MERGED}
    matrices = load_file(stage / "adapter/adapter_model.safetensors")
    assert len(matrices) == 2 * 7 * 2  # layers, matrices, A and B
    assert {m.dtype for m in matrices.values()} == {torch.float32}

    tokens = AutoTokenizer.from_pretrained(stage / "model")("The sky is blue, and so is the sea.", return_tensors="pt")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        before = base(**tokens).logits
        adapted = PeftModel.from_pretrained(base, stage / "adapter")(**tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(stage / "model").eval()
        together = merged(**tokens).logits
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    spread = float((adapted - before).abs().max())
    assert spread > 0.5
    assert float((adapted - together).abs().max()) < 1e-4 * spread
