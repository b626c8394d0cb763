"""Hostile training data: 2,000 random groups of odd shapes and scores, no NaN and no crash."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spalign.errors import DataError
from spalign.training.trainer import SPAConfig, SPATrainer

VOCAB, EOS = 40, 1


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w2")


def hostile_rows(rng: random.Random, group: int) -> list[dict[str, Any]]:
    """One to six pairs of a prompt: empty and one-token sides, identical sides, sides and prompts beyond the window, weird numbers."""

    def tokens(most: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.choice((0, 1, 1, 2, 5, most)))]

    prompt = [3, *tokens(70)]
    responses = [tokens(70) for _ in range(rng.randrange(1, 5))]
    rows = []
    for i in range(rng.randrange(1, 7)):
        c, r = rng.choice(responses), rng.choice(responses)
        gap = rng.choice((0.0, 0.0, 1e-30, 1e-3, 1.0, 9.99, 1e30, math.nan, math.inf, -1.0))
        rows.append({"id": f"{group}/{i}", "prompt_ids": prompt, "chosen_ids": c, "rejected_ids": r, "gap": gap})
    return rows


def test_two_thousand_hostile_groups(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [row for g in range(2000) for row in hostile_rows(rng, g)]
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, max_position_embeddings=64))
    for loss in ("spa", "dpo", "sft"):
        args = SPAConfig(
            output_dir=str(tmp_path), loss=loss, use_cpu=True, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=16,
            gradient_accumulation_steps=2, learning_rate=1e-2, num_train_epochs=1, report_to="none",
        )  # fmt: skip
        trainer = SPATrainer(model, args, rows, tokenizer())
        kept = sum(len(g.pairs) for g in trainer.train_dataset)
        assert kept + sum(trainer.dropped.values()) == len(rows)
        numbers = {"gap, weight or margin negative or not finite"} if loss == "spa" else set()  # others look at no gap
        assert set(trainer.dropped) == {"empty", "identical sides", "too long", "repeated", *numbers}
        trainer.train()
        logged = [x for entry in trainer.state.log_history for x in entry.values() if isinstance(x, float)]
        assert all(map(math.isfinite, logged))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_data_of_nothing_but_rubbish_says_where_it_went(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = [
        {"prompt_ids": [3], "chosen_ids": [], "rejected_ids": [4], "gap": 1.0},
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], "gap": math.nan},
    ]
    with pytest.raises(DataError, match=r"'empty': 1.*not finite': 1"):
        SPATrainer(LlamaForCausalLM(LlamaConfig(**shape)), SPAConfig(output_dir=str(tmp_path), use_cpu=True), rows, tokenizer())
