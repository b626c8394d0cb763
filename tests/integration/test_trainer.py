"""SPATrainer on tiny random models: every batch layout and every split of a step gives the numbers of Eq. 3, written out plainly here."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from spalign.config import GuardConfig
from spalign.errors import DataError, ModelError
from spalign.training import head
from spalign.training.adapters import fuse_adapters
from spalign.training.batches import Layout, collate, layout_for, prepare, response_logps
from spalign.training.groups import TrainingGroup, TrainingPair
from spalign.training.guard import CollapseGuard, Probe
from spalign.training.trainer import SPAConfig, SPATrainer

BOS, EOS, PAD, VOCAB = 0, 1, 2, 200
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": BOS, "eos_token_id": EOS,
    "pad_token_id": PAD,
}  # fmt: skip
BETA, GAMMA, ALPHA = 2.5, 1.0, 1.5


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w4 .. w199 by their number; a BOS before plain text; a chat template."""
    words = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<user>": 3, **{f"w{i}": i for i in range(4, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    out = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    out.chat_template = "<s>{% for m in messages %}{% if m.role != 'assistant' %} <user>{% endif %} {{ m.content }}{% endfor %}"
    return out


def ids(rng: random.Random, n: int) -> tuple[int, ...]:
    return tuple(rng.randrange(4, VOCAB) for _ in range(n))


def groups_of(*shapes: tuple[int, int], seed: int = 0) -> list[TrainingGroup]:
    """A group for each (responses, pairs); prompts and responses of all lengths, gaps of all sizes, one of them 0."""
    rng = random.Random(seed)
    out = []
    for i, (n, k) in enumerate(shapes):
        responses = tuple((*ids(rng, rng.randrange(0, 14)), EOS) for _ in range(n))
        ordered = [(c, r) for c in range(n) for r in range(n) if c != r]
        pairs = [TrainingPair(c, r, round(rng.uniform(0, 9), 2)) for c, r in rng.sample(ordered, k)]
        if i == 0:
            pairs[0] = TrainingPair(pairs[0].chosen, pairs[0].rejected, 0.0)
        out.append(TrainingGroup((BOS, *ids(rng, rng.randrange(1, 9))), responses, tuple(pairs), f"g{i}"))
    return out


GROUPS = groups_of((4, 6), (2, 1), (3, 2), (5, 3))  # 14 responses, 12 pairs


def arguments(folder: Path, **changes: Any) -> SPAConfig:
    plain = {
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "beta": BETA,
        "gamma": GAMMA,
        "alpha": ALPHA,
        "max_grad_norm": 0.0,
    }
    return SPAConfig(output_dir=str(folder), **{**plain, "lr_scheduler_type": "constant", "learning_rate": 1e-3, **changes})


def trainer_for(
    folder: Path, model: Any, groups: Any = GROUPS, *, callbacks: Any = None, peft_config: Any = None, **changes: Any
) -> SPATrainer:
    args = arguments(folder, **changes)
    return SPATrainer(model, args, groups, tokenizer(), peft_config=peft_config, callbacks=callbacks)


# -- Eq. 3, written out -----------------------------------------------------------------------------------------------


def plain_logp(model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """1/|y| log pi(y|x): the prompt and one response in a row of their own, no mask, no positions, all logits."""
    logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logps[i, token] for i, token in zip(at, response, strict=True)]).mean()


def eq3(model: PreTrainedModel, groups: list[TrainingGroup], *, alpha: float = ALPHA) -> Tensor:
    pairs = [(g, p) for g in groups for p in g.pairs]
    mean_gap = sum(p.gap for _, p in pairs) / len(pairs)
    total = torch.zeros(())
    for g, p in pairs:
        chosen, rejected = (plain_logp(model, g.prompt, g.responses[i]) for i in (p.chosen, p.rejected))
        weight = (p.gap / mean_gap) ** alpha
        total = total - weight * torch.log(torch.sigmoid(BETA * chosen - BETA * rejected - GAMMA))
    return total / len(pairs)


def gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.reshape(-1) if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def gap(a: Tensor, b: Tensor) -> float:
    """Relative difference of two vectors."""
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def truth() -> tuple[float, Tensor]:
    """Loss and gradient of Eq. 3 over all GROUPS as one step."""
    model = llama()
    loss = eq3(model, GROUPS)
    loss.backward()
    return float(loss.detach()), gradient(model)


def step(trainer: SPATrainer, batches: list[dict[str, Tensor]]) -> tuple[float, Tensor]:
    """Summed loss and gradient of one optimiser step in these micro-batches."""
    trainer.model.zero_grad()
    got, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    assert items is None
    losses = [trainer.compute_loss(trainer.model, batch) for batch in got]
    torch.stack(losses).sum().backward()
    return sum(float(x.detach()) for x in losses), gradient(trainer.model)


def split(groups: list[TrainingGroup], size: int, layout: Layout = "packed") -> list[dict[str, Tensor]]:
    return [collate(groups[i : i + size], layout=layout, pad=PAD) for i in range(0, len(groups), size)]


# -- log-probabilities ------------------------------------------------------------------------------------------------


def own_rows(model: PreTrainedModel, groups: list[TrainingGroup] = GROUPS) -> Tensor:
    return torch.stack([plain_logp(model, g.prompt, r) for g in groups for r in g.responses])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("prompt", [3, 60])  # a long prompt is not repeated before each response: another way through attention
def test_log_probabilities_are_those_of_a_row_of_its_own(layout: Layout, prompt: int) -> None:
    groups = [replace(g, prompt=(BOS, *ids(random.Random(i), prompt + i))) for i, g in enumerate(GROUPS)]
    model = llama()
    batch = collate(groups, layout=layout, pad=PAD)
    if layout == "packed":
        assert len(batch["packed"]["blocks"]) == (2 if prompt == 60 else 1)
    plain = own_rows(model, groups)
    prepare(model)
    means, count = response_logps(model, batch)
    assert count.tolist() == [len(r) for g in groups for r in g.responses]
    assert float(((means - plain) / plain).detach().abs().max()) < 1e-5
    # and so is the gradient: every log-probability pulls with a weight of its own
    pull = torch.linspace(-1, 2, len(means))
    (means * pull).sum().backward()
    got = gradient(model)
    model.zero_grad()
    (own_rows(model, groups) * pull).sum().backward()
    assert gap(got, gradient(model)) < 1e-5


FAMILIES: dict[str, tuple[dict[str, Any], Layout]] = {
    "mistral": ({"sliding_window": 4}, "packed"),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "packed"),
    "qwen3": ({"head_dim": 8, "tie_word_embeddings": True}, "packed"),
    "gemma2": ({"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.5}, "padded"),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0}, "packed"),
    "cohere": ({"logit_scale": 0.25}, "packed"),
    "granite": ({"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7}, "packed"),
    "olmo2": ({}, "packed"),
    "phi3": ({}, "packed"),
    "stablelm": ({}, "padded"),  # its attention is its own and takes no layout
    "mixtral": ({"num_local_experts": 4, "sliding_window": None}, "packed"),
    "gpt2": ({"n_positions": 128}, "padded"),
    "gpt_neox": ({}, "packed"),
    "falcon": ({"alibi": True, "new_decoder_architecture": False}, "padded"),
    "mamba": ({"state_size": 4}, "padded"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_gives_the_numbers_of_a_row_of_its_own(family: str) -> None:
    # windows narrower than the rows, soft caps, scaled logits, tied heads, experts, absolute positions, no attention at all
    changes, layout = FAMILIES[family]
    torch.manual_seed(0)
    shape = {**SHAPE, "pad_token_id": PAD, "eos_token_id": EOS, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    plain = own_rows(model)
    if family == "gemma2":  # by default transformers leaves its cap of scores out; prepared, it is there
        model.set_attn_implementation("eager")
        without, plain = plain.detach(), own_rows(model)
        assert float((without - plain.detach()).abs().max()) > 1e-3
        model.set_attn_implementation("sdpa")
    assert prepare(model) == layout
    assert model.spalign_tiled
    means, _ = response_logps(model, collate(GROUPS, layout=layout, pad=PAD))
    assert float(((means - plain) / plain).detach().abs().max()) < 1e-5
    means.sum().backward()
    got = gradient(model)
    model.zero_grad()
    own_rows(model).sum().backward()
    assert gap(got, gradient(model)) < 1e-4


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own reference of flex attention, with a backward pass on any device; only its kernel for CPUs lacks one, so it is refused."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("spalign.training.batches.check_device", lambda _: None)
    monkeypatch.setattr("spalign.training.flex.kernel", lambda: flex_attention)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("family", ["llama", *(f for f, (_, layout) in FAMILIES.items() if layout == "packed")])
def test_flex_attention_gives_the_numbers_of_a_row_of_its_own(family: str) -> None:
    changes, _ = FAMILIES.get(family, ({}, ""))
    torch.manual_seed(0)
    shape = {**SHAPE, "pad_token_id": PAD, "eos_token_id": EOS, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    plain = own_rows(model)
    assert prepare(model, "flex") == "flex"
    means, _ = response_logps(model, collate(GROUPS, layout="flex", pad=PAD))
    assert float(((means - plain) / plain).detach().abs().max()) < 1e-5
    pull = torch.linspace(-1, 2, len(means))
    (means * pull).sum().backward()
    got = gradient(model)
    model.zero_grad()
    (own_rows(model) * pull).sum().backward()
    assert gap(got, gradient(model)) < 1e-4


def test_fused_adapters_take_less_memory_and_are_no_further_from_float32() -> None:
    def seen(fused: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, int]:
        base = llama().to(torch.bfloat16).to(dtype)
        prepare(base)
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        if fused:
            fuse_adapters(model)
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        half = dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            means, _ = response_logps(model, collate(GROUPS, layout="packed", pad=PAD))
        means.sum().backward()
        return means.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]), sum(kept.values())

    exact_means, exact_grad, _ = seen(False, torch.float32)
    fused_means, fused_grad, _ = seen(True, torch.float32)
    assert gap(fused_means, exact_means) < 1e-6
    assert gap(fused_grad, exact_grad) < 1e-5
    (means, grad, less), (their_means, their_grad, more) = seen(True), seen(False)
    assert gap(means, exact_means) < 1.1 * gap(their_means, exact_means)
    assert gap(grad, exact_grad) < 1.1 * gap(their_grad, exact_grad)
    assert less < 0.95 * more


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_the_trainer_s_step_with_flex_attention(tmp_path: Path, truth: tuple[float, Tensor], how: dict[str, bool]) -> None:
    trainer = trainer_for(tmp_path, llama(), attention="flex", **how)
    if "gradient_checkpointing" in how:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    with trainer.accelerator.autocast():
        loss, grad = step(trainer, split(GROUPS, 2, "flex"))
    exact = "bf16" not in how
    assert loss == pytest.approx(truth[0], rel=1e-5 if exact else 0.02)
    assert gap(grad, truth[1]) < (1e-5 if exact else 0.1)


@pytest.mark.usefixtures("flex_on_cpu")
def test_a_model_may_change_between_ways_of_attention_but_not_with_dropout(tmp_path: Path) -> None:
    model = llama()
    assert [prepare(model, how) for how in ("rows", "flex", "flex", "rows")] == ["packed", "flex", "flex", "packed"]
    means, _ = response_logps(model, collate(GROUPS, layout="packed", pad=PAD))
    assert float(((means - own_rows(llama())) / means).detach().abs().max()) < 1e-5
    with pytest.raises(ModelError, match=r"attention dropout \(0.1\), which flex attention does not know"):
        trainer_for(tmp_path, llama(attention_dropout=0.1), attention="flex", disable_dropout=False)


def test_flex_attention_where_it_cannot_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"flex attention trains on CUDA, and the model is on 'cpu'.*\n  fix: set train.attention=rows"):
        trainer_for(tmp_path, llama(), attention="flex")
    with pytest.raises(ValueError, match="attention must be rows or flex"):
        arguments(tmp_path, attention="ring")


def test_eager_attention_uses_padded_rows() -> None:
    model = llama(attn_implementation="eager")
    plain = own_rows(model)
    assert prepare(model) == "padded"
    means, _ = response_logps(model, collate(GROUPS, layout="padded", pad=PAD))
    assert float(((means - plain) / plain).detach().abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (LlamaConfig(**SHAPE), "packed"),
        (MistralConfig(**SHAPE, sliding_window=64), "packed"),
        (LlamaConfig(**SHAPE, attn_implementation="flash_attention_2"), "padded"),
    ],
)
def test_layout(config: Any, layout: Layout) -> None:
    assert layout_for(config) == layout


def test_a_prepared_model_generates_as_before() -> None:
    model = llama().eval()
    prompt = torch.tensor([[BOS, 5, 6, 7], [BOS, 8, 9, 10]])
    before = model.generate(prompt, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(prompt))
    prepare(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(prompt)), before)


def test_a_head_that_does_more_than_its_configuration_says_keeps_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    torch.manual_seed(0)
    model = Odd(LlamaConfig(**SHAPE))
    plain = own_rows(model)
    with caplog.at_level(logging.WARNING):
        layout = prepare(model)
    assert "does more than its configuration says" in caplog.text
    for how in (layout, "padded"):
        means, _ = response_logps(model, collate(GROUPS, layout=how, pad=PAD))
        assert float(((means - plain) / plain).detach().abs().max()) < 1e-5


def test_an_adapter_on_the_head_is_not_overlooked() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    plain = own_rows(model)
    layout = prepare(model.get_base_model())
    means, _ = response_logps(model, collate(GROUPS, layout=layout, pad=PAD))
    assert float(((means - plain) / plain).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("kept", [0, 1 << 27], ids=["made again", "kept"])
def test_logits_exist_a_tile_at_a_time_or_all_where_they_are_few_and_in_float32_a_stretch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truth: tuple[float, Tensor], kept: int
) -> None:
    monkeypatch.setitem(head.TILE, True, 8 * VOCAB)
    monkeypatch.setitem(head.STRETCH, True, 3 * VOCAB)
    monkeypatch.setitem(head.KEPT, True, kept)
    tiles: list[int] = []
    stretches: list[int] = []
    pull, turn = head._Head.pull, head._Head._turn

    def pulled(self: Any, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        tiles.append(len(hidden))
        return pull(self, hidden, target)

    def turned(self: Any, products: Tensor, target: Tensor) -> Tensor:
        stretches.append(len(products))
        return turn(self, products, target)

    monkeypatch.setattr(head._Head, "pull", pulled)
    monkeypatch.setattr(head._Head, "_turn", turned)
    trainer = trainer_for(tmp_path, llama())
    tiles.clear()  # of the check that goes before
    stretches.clear()
    loss, grad = step(trainer, split(GROUPS, len(GROUPS)))
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert gap(grad, truth[1]) < 1e-5
    tokens = sum(len(r) for g in GROUPS for r in g.responses)
    assert tokens > 8
    assert max(tiles) == (tokens if kept else 8)
    assert max(stretches) == 3
    assert sum(tiles) == sum(stretches) == (tokens if kept else 2 * tokens)


# -- loss and gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_micro_batches_add_up_to_eq3(tmp_path: Path, truth: tuple[float, Tensor], size: int, layout: Layout) -> None:
    loss, grad = step(trainer_for(tmp_path, llama()), split(GROUPS, size, layout))
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert gap(grad, truth[1]) < 1e-5


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (2, 0, 3, 1)])
def test_the_order_of_prompts_does_not_matter(tmp_path: Path, truth: tuple[float, Tensor], order: tuple[int, ...]) -> None:
    loss, grad = step(trainer_for(tmp_path, llama()), split([GROUPS[i] for i in order], 2))
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert gap(grad, truth[1]) < 1e-5


def test_pair_by_pair_groups_give_the_same(tmp_path: Path, truth: tuple[float, Tensor]) -> None:
    plain = [
        TrainingGroup(g.prompt, (g.responses[p.chosen], g.responses[p.rejected]), (TrainingPair(0, 1, p.gap),))
        for g in GROUPS
        for p in g.pairs
    ]
    loss, grad = step(trainer_for(tmp_path, llama()), split(plain, 5))
    assert loss == pytest.approx(truth[0], rel=1e-5)
    assert gap(grad, truth[1]) < 1e-5


# -- the other losses -------------------------------------------------------------------------------------------------


def by_pairs(model: PreTrainedModel, loss: str, reference: PreTrainedModel | None = None) -> Tensor:
    """DPO and SFT written out, a response at a time."""
    total, n = torch.zeros(()), 0
    if loss == "sft":
        for g in GROUPS:
            for i in {p.chosen for p in g.pairs}:
                total, n = total - plain_logp(model, g.prompt, g.responses[i]) * len(g.responses[i]), n + len(g.responses[i])
        return total / n
    assert reference is not None
    for g in GROUPS:
        for p in g.pairs:
            c, r = (
                (plain_logp(model, g.prompt, g.responses[i]) - plain_logp(reference, g.prompt, g.responses[i]).detach())
                * len(g.responses[i])
                for i in (p.chosen, p.rejected)
            )
            total, n = total - torch.log(torch.sigmoid(0.1 * (c - r))), n + 1
    return total / n


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_dpo_and_sft_by_hand(tmp_path: Path, loss: str, size: int) -> None:
    reference, model = llama(seed=1), llama()
    truth = by_pairs(model, loss, reference)
    truth.backward()
    expected, grad = float(truth.detach()), gradient(model)
    groups = trainer_for(tmp_path, reference, loss="dpo")._with_references(GROUPS) if loss == "dpo" else GROUPS
    got, mine = step(trainer_for(tmp_path, llama(), groups, loss=loss, beta=0.1), split(groups, size))
    assert got == pytest.approx(expected, rel=1e-5)
    assert gap(mine, grad) < 1e-5


@pytest.mark.parametrize("adapter", [False, True])
def test_dpo_begins_at_log_two_and_keeps_its_reference(tmp_path: Path, adapter: bool) -> None:
    # the policy is its own reference at first: every margin is 0, and -log sigmoid(0) = 0.6931
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    settings = {"loss": "dpo", "beta": 0.5, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    trainer = trainer_for(tmp_path, llama(), peft_config=config, max_steps=12, **settings)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    again = trainer_for(tmp_path, llama(), loss="dpo")._with_references(GROUPS)
    assert [r for g in trainer.train_dataset for r in g.references] == pytest.approx([r for g in again for r in g.references], abs=1e-4)


def test_dpo_with_fsdp_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path, llama(), loss="dpo")
    trainer.is_fsdp_enabled = True
    with pytest.raises(DataError, match="reference pass"):
        trainer.train()


def test_simpo_is_spa_with_all_weights_one(tmp_path: Path) -> None:
    simpo, _ = step(trainer_for(tmp_path, llama(), loss="simpo"), split(GROUPS, 2))
    alpha0, _ = step(trainer_for(tmp_path, llama(), alpha=0.0), split(GROUPS, 2))
    assert simpo == alpha0


def test_weights_and_margins_come_from_the_columns_that_are_named(tmp_path: Path) -> None:
    rows = [
        {"prompt": "w4 w5", "chosen": "w6 w7", "rejected": "w8", "weight": 2.0, "m": 0.25, "gap": 5.0},
        {"prompt": "w4 w5", "chosen": "w6 w7", "rejected": "w9 w10", "weight": 0.5, "m": 1.5, "gap": 1.0},
    ]
    trainer = trainer_for(tmp_path, llama(), rows, weight_column="weight", margin_column="m")
    got, grad = step(trainer, split(trainer.train_dataset, 1))
    model = llama()
    logps = {r: plain_logp(model, (BOS, 4, 5), r) for r in ((6, 7, EOS), (8, EOS), (9, 10, EOS))}
    margins = [BETA * (logps[6, 7, EOS] - logps[r]) - m for r, m in (((8, EOS), 0.25), ((9, 10, EOS), 1.5))]
    truth = -(2.0 * torch.nn.functional.logsigmoid(margins[0]) + 0.5 * torch.nn.functional.logsigmoid(margins[1])) / 2
    truth.backward()
    assert got == pytest.approx(float(truth.detach()), rel=1e-5)
    assert gap(grad, gradient(model)) < 1e-5


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0: w is None"):
        trainer_for(tmp_path, llama(), [{"prompt": "w4", "chosen": "w6", "rejected": "w7"}], weight_column="w")


def test_an_unknown_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss must be one of spa, simpo, dpo, sft"):
        arguments(tmp_path, loss="orpo")


def test_another_forward_pass_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel would replace the forward pass"):
        arguments(tmp_path, use_liger_kernel=True)


def test_alpha_zero_needs_no_gaps(tmp_path: Path) -> None:
    none = [TrainingGroup(g.prompt, g.responses, tuple(TrainingPair(p.chosen, p.rejected, 0.0) for p in g.pairs)) for g in GROUPS]
    loss, grad = step(trainer_for(tmp_path, llama(), none, alpha=0.0), split(none, 2))
    model = llama()
    simpo = eq3(model, GROUPS, alpha=0.0)
    simpo.backward()
    assert loss == pytest.approx(float(simpo.detach()), rel=1e-5)
    assert gap(grad, gradient(model)) < 1e-5


def test_a_step_whose_gaps_are_all_zero_has_no_weight_and_does_not_stop_training(tmp_path: Path) -> None:
    none = [TrainingGroup(g.prompt, g.responses, tuple(TrainingPair(p.chosen, p.rejected, 0.0) for p in g.pairs)) for g in GROUPS]
    loss, grad = step(trainer_for(tmp_path, llama(), none), split(none, 2))
    assert loss == 0.0
    assert not grad.any()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, truth: tuple[float, Tensor]) -> None:
    trainer = trainer_for(tmp_path, llama(), gradient_checkpointing=True)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    _, grad = step(trainer, split(GROUPS, 2))
    assert gap(grad, truth[1]) < 1e-5


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_alpha_zero_equals_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sft_weight: float) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # its only warning, on import
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows = [
        {"prompt": "w4 w5 w6", "chosen": " w7 w8 w9 w10", "rejected": " w11 w12"},
        {"prompt": "w4 w5 w6", "chosen": " w11 w12", "rejected": " w20 w21 w22"},
        {"prompt": "w30", "chosen": " w31", "rejected": " w32 w33 w34 w35 w36"},
    ]
    theirs_args = CPOConfig(
        output_dir=str(tmp_path), loss_type="simpo", cpo_alpha=sft_weight, alpha=0.0, beta=BETA, simpo_gamma=GAMMA, use_cpu=True,
        bf16=False, gradient_checkpointing=False, per_device_train_batch_size=3, report_to="none", disable_tqdm=True, max_length=64,
    )  # fmt: skip
    theirs = CPOTrainer(model=llama(), args=theirs_args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    their_loss, metrics = theirs.get_batch_loss_metrics(theirs.model, next(iter(theirs.get_train_dataloader())))
    their_loss.backward()

    ours = trainer_for(tmp_path, llama(), rows, alpha=0.0, sft_weight=sft_weight)
    groups = list(ours.train_dataset)
    assert [(len(g.responses), len(g.pairs)) for g in groups] == [(3, 2), (2, 1)]
    loss, grad = step(ours, split(groups, 1))
    assert loss == pytest.approx(float(their_loss.detach()), rel=1e-5)
    assert gap(grad, gradient(theirs.model)) < 1e-5
    ours.log({"loss": loss})
    assert ours.state.log_history[-1]["logps/chosen"] == pytest.approx(metrics["logps/chosen"], rel=1e-5)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_become_groups_with_template_bos_and_eos(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w4 w5"}]
    rows = [
        {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": "w6"}],
            "rejected": [{"role": "assistant", "content": "w7 w8"}],
            "gap": 2,
        },
        {"prompt": "w4 w5", "chosen": "w6 </s>", "rejected": "w7", "gap": 3},
        {"prompt_ids": [0, 9], "chosen_ids": [10], "rejected_ids": [11, 1], "gap": 4, "extra": [1, 2]},
    ]
    trainer = trainer_for(tmp_path, llama(), rows)
    assert [(g.prompt, g.responses) for g in trainer.train_dataset] == [
        ((0, 3, 4, 5), ((6, 1), (7, 8, 1))),  # conversational: template, EOS
        ((0, 4, 5), ((6, 1), (7, 1))),  # plain: BOS, one EOS
        ((0, 9), ((10,), (11, 1))),  # ids as they are
    ]


def test_rows_that_leave_nothing_or_lack_gaps_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "w4", "chosen": "w6", "rejected": "w7"}
    with pytest.raises(DataError, match="row 0 has no gap"):
        trainer_for(tmp_path, llama(), [row])
    with pytest.raises(DataError, match="the data is empty"):
        trainer_for(tmp_path, llama(), [])
    with pytest.raises(DataError, match=r"no pair is left to train on \(dropped: {'too long': 1}\)"):
        trainer_for(tmp_path, llama(), [{**row, "gap": 1}], max_length=3)  # 2 prompt tokens and 2
    with pytest.raises(DataError, match="too long"):  # the model's window
        trainer_for(tmp_path, llama(max_position_embeddings=3), [{**row, "gap": 1}], max_length=100)


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"gamma": -0.1}, {"alpha": -1.0}])
def test_senseless_arguments_are_refused(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="beta must be > 0"):
        arguments(tmp_path, **bad)


# -- training ---------------------------------------------------------------------------------------------------------


class Order(TrainerCallback):  # type: ignore[misc]
    """Ends training as told; records nothing."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.at
        return control


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2), (1, 4), (3, 2)])
def test_a_step_of_the_trainer_is_the_gradient_of_eq3(tmp_path: Path, truth: tuple[float, Tensor], batch: int, accumulate: int) -> None:
    # SGD at rate 0.1: the weights move by -0.1 times the gradient, so nothing divided the loss on its way; the log says the loss itself
    model = llama()
    before = weights(model)
    trainer = trainer_for(
        tmp_path,
        model,
        optim="sgd",
        learning_rate=0.1,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
    )
    trainer.train()
    assert gap((before - weights(model)) / 0.1, truth[1]) < 1e-3  # fp32 subtraction of nearly equal weights
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(truth[0], rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(float(truth[1].norm()), rel=1e-4)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(truth[0], rel=1e-5)


def test_a_short_last_step_is_averaged_over_its_own_pairs(tmp_path: Path) -> None:
    # four prompts, three a step: steps of 3 and 1; at rate 0 the model stays, so every step's loss is Eq. 3 of its own prompts
    seen: list[list[str]] = []
    trainer = trainer_for(
        tmp_path, llama(), optim="sgd", learning_rate=0.0, num_train_epochs=1, gradient_accumulation_steps=3, per_device_train_batch_size=1
    )
    inner = trainer.data_collator
    trainer.data_collator = lambda groups: seen.append([g.name for g in groups]) or inner(groups)
    trainer.train()
    names = [name for batch in seen for name in batch]
    by_name = {g.name: g for g in GROUPS}
    model = llama()
    with torch.no_grad():
        expected = [float(eq3(model, [by_name[n] for n in part])) for part in (names[:3], names[3:4])]
    assert [e["loss"] for e in trainer.state.log_history if "loss" in e] == pytest.approx(expected, rel=1e-5)


def test_logging_less_often_averages_steps_and_pools_pairs(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama(), optim="sgd", learning_rate=0.0, max_steps=4, logging_steps=4, gradient_accumulation_steps=1)
    trainer.train()
    model = llama()
    with torch.no_grad():
        loss = sum(float(eq3(model, [g])) for g in GROUPS) / 4
        logps = [
            (plain_logp(model, g.prompt, g.responses[p.chosen]), plain_logp(model, g.prompt, g.responses[p.rejected]))
            for g in GROUPS
            for p in g.pairs
        ]
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["pairs/accuracy"] == pytest.approx(sum(c > r for c, r in logps) / 12)
    assert logged["logps/chosen"] == pytest.approx(float(sum(c for c, _ in logps)) / 12, rel=1e-5)
    assert logged["pairs/margin"] == pytest.approx(float(sum(c - r for c, r in logps)) / 12, rel=1e-4)
    lengths = [len(g.responses[p.chosen]) for g in GROUPS for p in g.pairs]
    assert logged["length/chosen"] == pytest.approx(sum(lengths) / 12)


def test_training_lowers_the_loss_and_ranks_the_pairs(tmp_path: Path) -> None:
    # responses of a prompt in one order each, so that every pair can be won
    rng = random.Random(1)
    groups = []
    for i in range(4):
        responses = tuple((*ids(rng, 3 + i), EOS) for _ in range(3))
        groups.append(
            TrainingGroup(
                (BOS, *ids(rng, 4)), responses, (TrainingPair(0, 1, 2.0), TrainingPair(1, 2, 1.0), TrainingPair(0, 2, 3.0)), f"g{i}"
            )
        )
    trainer = trainer_for(tmp_path, llama(), groups, max_steps=30, learning_rate=3e-3, per_device_train_batch_size=4)
    trainer.train()
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[-1]["loss"] < 0.25 * logs[0]["loss"]
    assert logs[0]["pairs/accuracy"] < 1.0
    assert logs[-1]["pairs/accuracy"] == 1.0
    with torch.no_grad():
        for g in groups:
            best, middle, worst = (float(plain_logp(trainer.model, g.prompt, r)) for r in g.responses)
            assert best > middle > worst


def trained(folder: Path, **changes: Any) -> Tensor:
    """Weights after two epochs of eight groups, shuffled; AdamW with clipping unless told."""
    model = llama()
    trainer = trainer_for(folder, model, EIGHT, **{"num_train_epochs": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", **changes})
    trainer.train()
    return weights(model)


SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0}  # Adam and clipping would hide a gradient of the wrong scale
EIGHT = groups_of((3, 2), (2, 1), (4, 5), (2, 2), (3, 3), (2, 1), (2, 1), (3, 4), seed=1)


def test_gradient_accumulation_gives_the_same_weights(tmp_path: Path) -> None:
    one = trained(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1, **SGD)
    two = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **SGD)
    assert gap(one, weights(llama())) > 1e-3  # it moved
    assert gap(one, two) < 1e-5


def test_resuming_from_a_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    # two epochs of 4 steps; stopped after step 3, in the middle of the first epoch
    through = trained(tmp_path / "a", per_device_train_batch_size=2)
    settings = {"num_train_epochs": 2, "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 2}
    first = trainer_for(tmp_path / "b", llama(), EIGHT, callbacks=[Order(at=3)], save_strategy="steps", save_steps=3, **settings)
    first.train()
    assert first.state.global_step == 3
    model = llama(seed=7)  # other weights: all must come from the checkpoint
    second = trainer_for(tmp_path / "b", model, EIGHT, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert second.state.global_step == 8
    assert torch.equal(weights(model), through)


class Poison(TrainerCallback):  # type: ignore[misc]
    """Breaks a weight after step `at`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> Any:
        if state.global_step == self.at:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = float("nan")
        return control


@pytest.mark.parametrize("at", [0, 2])
def test_a_loss_that_is_not_finite_names_its_step(tmp_path: Path, at: int) -> None:
    model = llama()
    if at == 0:
        with torch.no_grad():
            model.lm_head.weight[5, 0] = float("inf")
    trainer = trainer_for(tmp_path, model, callbacks=[Poison(at)], max_steps=5)
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {at + 1}, in rows g"):
        trainer.train()


def test_a_gradient_that_is_not_finite_names_its_rows_and_changes_no_weight(tmp_path: Path) -> None:
    model = llama()
    trainer = trainer_for(tmp_path, model, max_steps=3, per_device_train_batch_size=2)
    # a loss that is finite and a gradient that is not: d sqrt(x) / dx at 0
    model.model.norm.weight.register_hook(lambda g: g * float("inf"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is (nan|inf) at step 1, in rows g\d, g\d$"):
        trainer.train()
    assert torch.equal(weights(model), before)


def test_bf16_is_autocast_over_fp32_weights(tmp_path: Path, truth: tuple[float, Tensor]) -> None:
    model = llama()
    before = weights(model)
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    trainer = trainer_for(tmp_path, model, bf16=True, max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=1e-5)
    seen.clear()  # the model's first check is in fp32
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved = before - weights(model)
    assert float((moved != 0).float().mean()) > 0.2  # bf16 weights would lose nearly all updates of this size
    assert trainer.state.log_history[0]["loss"] == pytest.approx(truth[0], rel=2e-2)
    trainer.save_model()
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


# -- what is saved ----------------------------------------------------------------------------------------------------


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_saved_model_is_safetensors_and_loads_again(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama(), max_steps=2)
    trainer.train()
    trainer.save_model()
    assert not [n for n in names(tmp_path) if Path(n).suffix in {".bin", ".pt", ".pth"}]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names(tmp_path)
    again = SPATrainer(str(tmp_path), arguments(tmp_path), GROUPS)  # model and tokenizer by name
    assert torch.equal(weights(again.model), weights(trainer.model))
    assert next(again.model.parameters()).dtype == torch.float32
    assert again.processing_class.eos_token_id == EOS


def test_lora_trains_and_saves_an_adapter(tmp_path: Path) -> None:
    base = llama()
    frozen = weights(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_for(tmp_path, base, peft_config=config, max_steps=15, learning_rate=2e-2, per_device_train_batch_size=4)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model()
    assert "adapter_model.safetensors" in names(tmp_path)
    assert not [n for n in names(tmp_path) if Path(n).suffix in {".bin", ".pt", ".pth"} or n == "model.safetensors"]
    fresh = llama()
    assert torch.equal(weights(fresh), frozen)
    prepare(fresh)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    trainer.model.eval()
    with torch.no_grad():
        batch = collate(GROUPS, layout="packed", pad=PAD)
        ours, plain = response_logps(trainer.model, batch)[0], response_logps(loaded, batch)[0]
        with loaded.disable_adapter():
            before = response_logps(loaded, batch)[0]
    assert torch.allclose(ours, plain, rtol=1e-5)
    assert float((ours - before).abs().max()) > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_an_adapter(tmp_path: Path, checkpointing: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trainer_for(
        tmp_path, llama(), peft_config=config, max_steps=1, gradient_checkpointing=checkpointing, per_device_train_batch_size=4
    )
    trainer.train()
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert len(moved) == 4 and all(float(p.detach().abs().max()) > 0 for p in moved)  # B starts at 0


# -- the guard --------------------------------------------------------------------------------------------------------

FINE = Probe(words=50, repetition=0.1, empty=0.0)


class Scripted:
    """Answers to probes, and the weights at each."""

    def __init__(self, script: list[Probe]) -> None:
        self.script, self.seen, self.begun = list(script), list[Tensor](), 0

    def first(self, model: Any) -> dict[str, Any]:
        self.begun += 1
        return {"figures": asdict(FINE), "mark": "first"}

    def again(self, model: Any, first: dict[str, Any]) -> Probe:
        assert first == {"figures": asdict(FINE), "mark": "first"}
        self.seen.append(weights(model))
        return self.script.pop(0)


def guarded(folder: Path, script: list[Probe], **changes: Any) -> tuple[SPATrainer, CollapseGuard]:
    prober = Scripted(script)
    guard = CollapseGuard(prober, GuardConfig(every_steps=2))
    trainer = trainer_for(folder, llama(), callbacks=[guard], **{"max_steps": 7, "learning_rate": 1e-4, **changes})
    trainer.train()
    assert not prober.script  # every probe was asked for
    assert prober.begun == 1
    assert guard.before == FINE
    return trainer, guard


def probes(trainer: SPATrainer) -> list[dict[str, float]]:
    return [h for h in trainer.state.log_history if "repetition" in h]


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("checkpoint-*"))


STRATEGIES = [{"save_strategy": "no"}, {"save_strategy": "steps", "save_steps": 1}, {"save_strategy": "epoch"}]


@pytest.mark.parametrize("saving", STRATEGIES)
def test_passing_probes_save_checkpoints_also_after_the_last_step(tmp_path: Path, saving: dict[str, Any]) -> None:
    trainer, guard = guarded(tmp_path, [FINE] * 4, **saving)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-7"]
    assert trainer.state.global_step == 7
    assert guard.collapsed is None
    assert probes(trainer) == [
        {"step": s, "words": 50, "repetition": 0.1, "empty": 0.0, "kl": 0.0, "chosen": 0.0, "words_error": 0.0} for s in (2, 4, 6, 7)
    ]


@pytest.mark.parametrize("saving", STRATEGIES)
def test_a_collapse_stops_training_and_saves_nothing(tmp_path: Path, saving: dict[str, Any]) -> None:
    trainer, guard = guarded(tmp_path, [FINE, Probe(words=10, repetition=0.1, empty=0.0)], **saving)
    assert trainer.state.global_step == 4
    assert guard.collapsed == "length collapse: answers fell from 50 to 10 words"
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert [h["step"] for h in probes(trainer)] == [2, 4]


def test_a_collapse_at_the_last_step_is_found(tmp_path: Path) -> None:
    trainer, guard = guarded(tmp_path, [FINE, Probe(50, 0.1, 0.5)], max_steps=3)
    assert trainer.state.global_step == 3
    assert guard.collapsed == "empty answers: 0% before, 50% now"
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_the_guard_probes_the_model_that_trains(tmp_path: Path) -> None:
    prober = Scripted([FINE] * 2)
    trainer = trainer_for(tmp_path, llama(), callbacks=[CollapseGuard(prober, GuardConfig(every_steps=1))], max_steps=2)
    trainer.train()
    assert not torch.equal(prober.seen[0], prober.seen[1])
    assert torch.equal(prober.seen[1], weights(trainer.model))


def test_what_the_policy_was_before_training_is_kept_over_a_resume(tmp_path: Path) -> None:
    guarded(tmp_path, [FINE] * 2, max_steps=4)
    later = Scripted([FINE] * 2)
    guard = CollapseGuard(later, GuardConfig(every_steps=2))
    trainer_for(tmp_path, llama(), callbacks=[guard], max_steps=7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert later.begun == 0
    assert guard.before == FINE
    state = tmp_path / "checkpoint-4/trainer_state.json"
    told = json.loads(state.read_text())
    told["log_history"] = [h for h in told["log_history"] if "before" not in h]
    state.write_text(json.dumps(told))
    with pytest.raises(DataError, match="the checkpoint of step 4 is of an earlier version"):
        trainer_for(tmp_path, llama(), callbacks=[guard], max_steps=7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# -- several ranks ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ddp_settings(what: str = "ddp") -> dict[str, Any]:
    return {"num_train_epochs": 2, "dataloader_drop_last": what == "ddp-drop", **SGD}


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for p in started:
        p.kill()
        p.wait()


def start_ranks(workers: list[subprocess.Popen[str]], folder: Path, *what: str) -> None:
    """Two ranks on loopback, each this file as a program, which does one after the other, each in a folder of its own."""
    for each in what:
        (folder / each).mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for rank in "01":
        env = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, __file__, str(folder), *what]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def join_ranks(workers: list[subprocess.Popen[str]]) -> None:
    for p in workers:
        out, _ = p.communicate(timeout=600)
        assert p.returncode == 0, out


def test_the_trainer_with_fsdp2_gives_the_weights_of_one(tmp_path: Path, workers: list[subprocess.Popen[str]]) -> None:
    """By accelerate, as with configs/accelerate/fsdp2.yaml; only its refusal of CPUs is talked past."""
    start_ranks(workers, tmp_path, "trainer", "trainer-adapter")
    join_ranks(workers)
    for what in ("trainer", "trainer-adapter"):
        folder, own = tmp_path / what, of_trainer(what)
        model = llama(tie_word_embeddings=True)
        alone = trainer_for(folder / "alone", model, EIGHT, per_device_train_batch_size=4, peft_config=own, **ddp_settings())
        alone.train()
        alone.save_model(str(folder / "alone"))
        held_out = alone.evaluate(GROUPS[:3])["eval_loss"]
        name = "adapter_model.safetensors" if own else "model.safetensors"
        here, there = (load_file(folder / which / name) for which in ("alone", "two"))
        assert here.keys() == there.keys() - {"lm_head.weight"}  # tied: it is written twice, and the same
        assert "lm_head.weight" not in there or torch.equal(there["lm_head.weight"], there["model.embed_tokens.weight"])
        assert max(gap(there[k], here[k]) for k in here) < 1e-5
        for r in "01":
            found = json.loads((folder / f"found{r}.json").read_text())
            assert found["losses"] == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], rel=1e-5)
            assert found["held_out"] == pytest.approx(held_out, rel=1e-4)


def of_trainer(what: str) -> LoraConfig | None:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if what == "trainer-adapter" else None


def fsdp2_trainer_worker(folder: Path, what: str) -> None:
    from accelerate.state import DistributedType, PartialState

    own = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    own |= {"RESHARD_AFTER_FORWARD": "true", "CPU_RAM_EFFICIENT_LOADING": "false", "TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    os.environ.update({"ACCELERATE_USE_FSDP": "true", **{f"FSDP_{k}": v for k, v in own.items()}})
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo", **ddp_settings()}
    args = arguments(folder / "run", **settings)
    PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = SPATrainer(llama(tie_word_embeddings=True), args, EIGHT, tokenizer(), peft_config=of_trainer(what))
    assert trainer.is_fsdp_enabled
    assert trainer.accelerator.is_fsdp2
    with pytest.raises(DataError, match="the weights are spread over devices when training begins, not before"):
        trainer.evaluate(GROUPS[:3])
    trainer.train()
    found = {"losses": [e["loss"] for e in trainer.state.log_history if "loss" in e], "held_out": trainer.evaluate(GROUPS[:3])["eval_loss"]}
    (folder / f"found{os.environ['RANK']}.json").write_text(json.dumps(found))
    trainer.save_model(str(folder / "two"))
    del trainer
    gc.collect()


def test_two_ranks_give_the_weights_of_one_and_stop_together(tmp_path: Path, workers: list[subprocess.Popen[str]]) -> None:
    # a step of four prompts: two ranks with two micro-batches of one, against one rank with one of four; five prompts, one of them left out
    start_ranks(workers, tmp_path, "ddp", "ddp-drop", "poisoned")
    join_ranks(workers)
    for what in ("ddp", "ddp-drop"):
        folder, model = tmp_path / what, llama()
        alone = trainer_for(folder / "alone", model, of_ranks(what), per_device_train_batch_size=4, **ddp_settings(what))
        alone.train()
        held_out = without_times(alone.evaluate(GROUPS[:3]))
        for r in "01":  # three prompts do not share evenly
            assert without_times(json.loads((folder / f"evaluated{r}.json").read_text())) == pytest.approx(held_out, rel=1e-4)
        together = [load_file(folder / f"rank{r}.safetensors")["weights"] for r in "01"]
        assert torch.equal(together[0], together[1])
        assert gap(weights(model), weights(llama())) > 1e-3  # it moved
        assert gap(together[0], weights(model)) < 1e-5
        losses = json.loads((folder / "losses.json").read_text())
        assert losses == pytest.approx([e["loss"] for e in alone.state.log_history if "loss" in e], rel=1e-5)
    # a loss that one of them finds not finite ends both
    assert [(tmp_path / "poisoned" / f"said{r}").read_text() for r in "01"] == ["loss is inf at step 1, in rows poisoned"] * 2


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if "_per_second" not in k and "runtime" not in k}


def of_ranks(what: str) -> list[TrainingGroup]:
    return EIGHT[:5] if what == "ddp-drop" else EIGHT


def ddp_worker(folder: Path, what: str) -> None:
    rank = os.environ["RANK"]
    model = llama()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "ddp_backend": "gloo", **ddp_settings(what)}
    trainer = trainer_for(folder / "two", model, of_ranks(what), **settings)
    trainer.train()
    (folder / f"evaluated{rank}.json").write_text(json.dumps(trainer.evaluate(GROUPS[:3])))
    assert trainer.accelerator.num_processes == 2
    save_file({"weights": weights(model)}, folder / f"rank{rank}.safetensors")
    if rank == "0":
        (folder / "losses.json").write_text(json.dumps([e["loss"] for e in trainer.state.log_history if "loss" in e]))
    # DDP's reducer must not hold the group last: it is freed with the interpreter locked and waits for threads that want that lock
    del trainer, model
    gc.collect()


def poisoned_worker(folder: Path) -> None:
    # of n >= 8 pairs one has nearly the whole gap: its weight n^50 > 8^50 = 1e45 is more than float32 holds, the others' are about 0
    groups = [replace(g, pairs=tuple(replace(p, gap=1.0) for p in g.pairs)) for g in EIGHT]
    groups[5] = replace(groups[5], name="poisoned", pairs=(replace(groups[5].pairs[0], gap=1e30),))
    model = llama()
    before = weights(model).clone()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "ddp_backend": "gloo", "alpha": 50.0}
    trainer = trainer_for(folder / "two", model, groups, **settings, **ddp_settings())
    with pytest.raises(FloatingPointError) as e:
        trainer.train()
    (folder / f"said{os.environ['RANK']}").write_text(str(e.value))
    assert torch.equal(weights(model), before)
    del trainer, model, e
    gc.collect()


if __name__ == "__main__":
    for what in sys.argv[2:]:
        folder = Path(sys.argv[1], what)
        if what.startswith("ddp"):
            ddp_worker(folder, what)
        elif what.startswith("trainer"):
            fsdp2_trainer_worker(folder, what)
        else:
            poisoned_worker(folder)
    torch.distributed.destroy_process_group()
