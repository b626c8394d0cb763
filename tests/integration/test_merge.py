"""Adapters of SPATrainer load in plain PEFT, and merged they say the same; what does not fit is refused with what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from spalign.engines.make import adapter_of
from spalign.errors import ModelError
from spalign.pipeline.checkpoints import hand_over
from spalign.training.merge import merge
from spalign.training.trainer import SPAConfig, SPATrainer

IDS = torch.arange(100, 164)[None]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Question {i}?"}],
        "chosen": [{"role": "assistant", "content": "Certainly, here it is."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "gap": 1.0 + i,
    }
    for i in range(2)
]


def trained(base: Path, folder: Path, **kind: Any) -> Path:
    """An adapter on the tiny model, two steps, saved as the trainer saves it."""
    args = SPAConfig(
        output_dir=str(folder), max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    trainer = SPATrainer(model, args, ROWS, AutoTokenizer.from_pretrained(base), peft_config=lora)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def base_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's shape with ordinary random weights: it has rows of zeros, whose length DoRA divides by."""
    torch.manual_seed(0)
    return Path(other_base(tmp_path_factory.mktemp("base"), tiny_model, initializer_range=0.2))


@pytest.fixture(scope="module")
def adapters(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: trained(base_model, folder / name, **kind) for name, kind in KINDS.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()  # type: ignore[no-any-return]


def plain(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loads_in_plain_peft_and_says_the_same_as_merged(adapters, base_model, tmp_path, kind):
    adapter = adapters[kind]
    base = plain(base_model)
    untrained = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, adapter))
    done = merge(adapter, tmp_path / "out")  # the base is what the adapter names
    merged = logits(plain(tmp_path / "out"))
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-3)
    assert float((adapted - untrained).abs().max()) > 0.1  # it learned something, or all would be equal
    torch.testing.assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)), adapted, rtol=0, atol=1e-6)
    # two layers of q k v o gate up down
    assert (done.modules, done.dtype) == (14, "float32")
    assert done.parameters == plain(base_model).num_parameters()


def test_the_merged_folder_is_whole_and_holds_no_pickle(adapters, base_model, tmp_path):
    merge(adapters["lora"], tmp_path / "out", model=str(base_model))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= names
    assert not {p for p in names if p.endswith((".bin", ".pt", ".pth"))}
    assert "adapter_config.json" not in names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing half done is left
    turns = [{"role": "user", "content": "Hi"}]
    one, other = (AutoTokenizer.from_pretrained(f).apply_chat_template(turns, tokenize=False) for f in (base_model, tmp_path / "out"))
    assert one == other


def test_the_type_of_the_weights(adapters, base_model, tmp_path):
    merge(adapters["lora"], tmp_path / "half", dtype="bfloat16")
    merge(adapters["lora"], tmp_path / "whole")
    half, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert {t.dtype for t in whole.values()} == {torch.float32}  # the base's own
    assert all(torch.equal(half[k], whole[k].bfloat16()) for k in whole)  # summed in float32, rounded once
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    shutil.copytree(tmp_path / "half", tmp_path / "base")
    assert merge(adapters["lora"], tmp_path / "again", model=str(tmp_path / "base")).dtype == "bfloat16"
    with pytest.raises(ModelError, match="dtype 'int8' is unknown"):
        merge(adapters["lora"], tmp_path / "never", dtype="int8")


def refused(adapter: Path, out: Path, **kwargs: Any) -> ModelError:
    there = out.exists()
    with pytest.raises(ModelError) as e:
        merge(adapter, out, **kwargs)
    assert e.value.hint
    assert out.exists() == there
    return e.value


def other_base(folder: Path, tiny_model: Path, **changes: Any) -> str:
    config = LlamaConfig.from_pretrained(tiny_model, **changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 32}, "its shapes are others"),
        # of 14 modules of two layers, 7 have no place in one layer and 7 of three get none; A and B of each: 14
        ({"num_hidden_layers": 1}, "14 of its weights have no place there and 0 places get none"),
        ({"num_hidden_layers": 3}, "0 of its weights have no place there and 14 places get none"),
    ],
)
def test_a_base_of_another_shape_is_refused(adapters, base_model, tmp_path, changes, why):
    base = other_base(tmp_path / "base", base_model, **changes)
    adapter = Path(shutil.copytree(adapters["lora"], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    # PEFT writes "all-linear" as every module's whole name, which a deeper model has too; most adapters name kinds of modules
    config["target_modules"] = sorted({name.rsplit(".", 1)[-1] for name in config["target_modules"]})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    error = refused(adapter, tmp_path / "out", model=base)
    assert "the adapter does not fit the model" in error.message
    assert why in error.message
    assert "--model" in error.hint
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "base"}


def test_what_is_missing_or_in_the_way_is_said_before_anything_is_loaded(adapters, base_model, tmp_path):
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "nowhere", out).message
    assert "not an adapter" in refused(base_model, out).message
    adapter = Path(shutil.copytree(adapters["lora"], tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in ((str(tmp_path / "gone"), "no such file or folder"), ("", "names no base model"), (None, "names no base model")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        error = refused(adapter, out)
        assert message in error.message
        assert "--model" in error.hint
    merge(adapter, tmp_path / "named", model=str(base_model))  # with it, all is well
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert "'IA3'; only LoRA" in refused(adapter, out).message
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot be read" in refused(adapter, out).message
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refused(adapter, out).message
    out.mkdir()
    (out / "mine.txt").write_text("x")
    for full in (out, out / "mine.txt"):
        assert "not an empty folder" in refused(adapters["lora"], full).message
    assert (out / "mine.txt").read_text() == "x"


def test_a_damaged_adapter_and_one_that_is_not_finite_are_refused(adapters, tmp_path):
    adapter = Path(shutil.copytree(adapters["lora"], tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v / 0 if "lora_B" in k else v for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    assert "cannot be merged" in refused(adapter, tmp_path / "out").message
    whole = (adapters["lora"] / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(adapter, tmp_path / "out").message


# a head that is the embedding, and what PEFT cannot merge


def noisy(base: str | Path, folder: Path, *targets: str, **kind: Any) -> Path:
    """An adapter whose every weight was moved at random."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights and of biases
        model = get_peft_model(
            plain(Path(base)), LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **kind)
        )
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn_like(p)
        model.save_pretrained(folder)
    return folder


def adapted(base: str | Path, adapter: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(plain(Path(base)), adapter))


@pytest.fixture(scope="module")
def tied_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return Path(other_base(tmp_path_factory.mktemp("tied"), tiny_model, initializer_range=0.2, tie_word_embeddings=True))


TIED: dict[str, tuple[tuple[str, ...], dict[str, Any], bool]] = {  # targets, options, whether they stay tied
    "neither": (("q_proj",), {}, True),
    "head": (("q_proj", "lm_head"), {}, False),
    "embedding": (("q_proj", "embed_tokens"), {}, False),
    "both": (("q_proj", "lm_head", "embed_tokens"), {}, False),
    "both alike": (("q_proj", "embed_tokens"), {"ensure_weight_tying": True}, True),
    "dora on the head": (("q_proj", "lm_head"), {"use_dora": True}, False),
    "whole head": (("q_proj",), {"modules_to_save": ["lm_head"]}, False),
    "whole embedding": (("q_proj",), {"modules_to_save": ["embed_tokens"]}, False),
    "whole and alike": (("q_proj",), {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tokens": (("q_proj",), {"trainable_token_indices": [120, 121]}, True),
    "tokens of the head": (("q_proj",), {"trainable_token_indices": {"lm_head": [120, 121]}}, False),
}


@pytest.mark.parametrize("where", TIED)
def test_an_adapter_on_a_tied_head_or_embedding_changes_only_what_it_is_on(tied_base, tmp_path, where):
    targets, kind, stays = TIED[where]
    adapter = noisy(tied_base, tmp_path / "adapter", *targets, **kind)
    merge(adapter, tmp_path / "out", model=str(tied_base))
    merged = plain(tmp_path / "out")
    torch.testing.assert_close(logits(merged), adapted(tied_base, adapter), rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings == stays
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) != stays
    assert float((logits(merged) - logits(plain(tied_base))).abs().max()) > 0.1


def test_the_model_that_a_run_hands_over_is_untied_too(tied_base, tmp_path):
    checkpoint = noisy(tied_base, tmp_path / "checkpoint-1", "q_proj", "lm_head")
    handed = hand_over(checkpoint, tmp_path, str(tied_base), trust_remote_code=False)
    assert handed == tmp_path / "model"
    assert adapter_of(str(handed)) == (str(tied_base), tmp_path / "adapter")
    moved = handed.rename(tmp_path / "model.held-back")  # as the gate does with both
    assert adapter_of(str(moved)) == (str(moved), None)
    handed = moved.rename(handed)
    (tmp_path / "other").mkdir()
    shutil.copytree(tied_base, tmp_path / "other/model")  # a model of another origin beside an adapter
    shutil.copytree(tmp_path / "adapter", tmp_path / "other/adapter")
    assert adapter_of(str(tmp_path / "other/model")) == (str(tmp_path / "other/model"), None)
    torch.testing.assert_close(logits(plain(handed)), adapted(tied_base, tmp_path / "adapter"), rtol=0, atol=1e-4)


def test_a_model_that_brings_its_code_is_handed_over_with_it(base_model, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(base_model, checkpoint)
    for name in ("modeling_own.py", "optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    handed = hand_over(checkpoint, tmp_path, str(base_model), trust_remote_code=False)
    assert {p.name for p in handed.iterdir()} >= {"modeling_own.py", "config.json", "model.safetensors", "tokenizer_config.json"}
    assert not {p.name for p in handed.iterdir()} & {"optimizer.pt", "trainer_state.json"}


def test_what_says_another_thing_when_merged_is_refused(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())  # as if its weights were lost
    assert "gives other logits" in refused(adapters["lora"], tmp_path / "out").message
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_asked_is_merged_all_the_same(adapters, tmp_path, monkeypatch):
    def stubborn(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("on CUDA only")

    with monkeypatch.context() as m:
        m.setattr(LlamaForCausalLM, "forward", stubborn)
        merge(adapters["lora"], tmp_path / "out")
    merge(adapters["lora"], tmp_path / "asked")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "asked"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_biases_of_lora_are_merged_where_the_base_has_some(base_model, tmp_path):
    adapter = noisy(base_model, tmp_path / "adapter", "q_proj", lora_bias=True)
    error = refused(adapter, tmp_path / "out", model=str(base_model))
    assert "cannot be merged: Impossible to merge LoRA with `lora_bias=True`" in error.message
    assert error.exit_code == 2
    biased = other_base(tmp_path / "biased", base_model, attention_bias=True)
    adapter = noisy(biased, tmp_path / "other", "q_proj", lora_bias=True)
    merge(adapter, tmp_path / "out", model=biased)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), adapted(biased, adapter), rtol=0, atol=1e-4)


def test_the_command(adapters, base_model, tmp_path):
    call = [sys.executable, "-m", "spalign.cli", "merge", str(adapters["dora"])]
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    done = subprocess.run([*call, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"merged into {tmp_path / 'out'}: ")
    assert (tmp_path / "out/model.safetensors").exists()
    again = subprocess.run([*call, str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert (
        again.stderr == f"error: {tmp_path / 'out'}: exists and is not an empty folder\n  fix: name a new folder; nothing is overwritten\n"
    )
