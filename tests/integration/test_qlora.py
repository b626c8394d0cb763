"""A base in four bits (NF4) under an adapter, on the CPU: bitsandbytes' own kernels, with the numbers of the same weights in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_accelerate_run import NO_LIMITS, config, trained
from test_trainer import ALPHA, GROUPS, PAD, eq3, gap, llama, own_rows, split, step, tokenizer, trainer_for
from torch import Tensor
from transformers import PreTrainedModel

from spalign.config import EngineConfig, config_from
from spalign.engines import loading
from spalign.engines.loading import load_model
from spalign.errors import ConfigError, ModelError
from spalign.pipeline import launch_file
from spalign.training.batches import collate, prepare, response_logps
from spalign.training.trainer import SPATrainer

bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'spalign[qlora]'"
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # a block of NF4 is 64 numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("base"))


def saved(folder: Path) -> Path:
    """A random model in `folder`, with its tokenizer."""
    llama(**WIDE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def four_bits(folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    model, _ = load_model(str(folder), EngineConfig(device=device, dtype=dtype), dtype="nf4")
    return model


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A plain float32 model that holds the numbers which the four bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = llama(**WIDE)
    held = {k: dequantize_4bit(p.data, p.quant_state) if hasattr(p, "quant_state") else p.data for k, p in model.named_parameters()}
    plain.load_state_dict({k: v.float() for k, v in held.items()})
    return plain


def bits(model: Any) -> dict[str, Tensor]:
    """Everything that the frozen base consists of, to the byte."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" not in k}


def adapter(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def gap_to(plain: PreTrainedModel, trainer: SPATrainer, changes: dict[str, Any], loss_of: Callable[[], float]) -> float:
    """Of the adapter's gradient to that of the same adapter on `plain`; both have the same loss. loss_of: takes the trainer's step."""
    reference = get_peft_model(plain, adapter(**changes))
    mine = {k: p for k, p in trainer.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for k, p in reference.named_parameters():
            if p.requires_grad:
                p.copy_(mine[k])
    loss = loss_of()
    truth = eq3(reference, GROUPS, alpha=ALPHA)
    truth.backward()
    assert loss == pytest.approx(float(truth.detach()), rel=1e-5)
    theirs = dict(reference.named_parameters())
    return gap(*(torch.cat([of[k].grad.reshape(-1).cpu() for k in mine]) for of in (mine, theirs)))


@bitsandbytes
@pytest.mark.parametrize("dora", [False, True])
def test_the_gradient_is_that_of_the_dequantised_base(tmp_path: Path, folder: Path, dora: bool) -> None:
    model = four_bits(folder)
    assert {p.dtype for p in model.model.layers.parameters()} == {torch.uint8, torch.float32}  # float32: the norms
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 128 * 64 // 2
    plain = dequantised(model)
    # NF4's error on normal weights is about a tenth of them: four bits, and no more than that
    lost = gap(*(m.model.layers[0].mlp.up_proj.weight.detach() for m in (plain, llama(**WIDE))))
    assert 0.05 < lost < 0.15

    changes = {"init_lora_weights": False, "use_dora": dora}  # as PEFT begins, B is 0 and A has no gradient
    trainer = trainer_for(tmp_path, model, peft_config=adapter(**changes))
    mine = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in mine} == {torch.float32}
    assert len(mine) == 2 * 7 * (3 if dora else 2)  # layers, matrices, A and B (and the magnitude)
    assert gap_to(plain, trainer, changes, lambda: step(trainer, split(GROUPS, 2))[0]) < 1e-5


@bitsandbytes
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_lowers_the_loss_and_changes_the_adapter_only(
    tmp_path: Path, folder: Path, dtype: str, close: float, checkpointing: bool
) -> None:
    model = four_bits(folder, dtype)
    before = bits(model)
    trainer = trainer_for(
        tmp_path, model, peft_config=adapter(), max_steps=8, learning_rate=1e-2, per_device_train_batch_size=4, max_grad_norm=1.0,
        bf16=dtype == "bfloat16", gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.2 * losses[0]
    after = bits(trainer.model.get_base_model())
    assert sum(v.numel() for v in before.values() if v.dtype == torch.uint8) > 0
    assert all(torch.equal(v, after[k.replace(".weight", ".base_layer.weight") if k not in after else k]) for k, v in before.items())

    trainer.save_model()
    assert "adapter_model.safetensors" in {p.name for p in tmp_path.iterdir()}
    batch = collate(GROUPS, layout="padded", pad=PAD)
    trainer.model.eval()
    with torch.no_grad():
        ours = response_logps(trainer.model, collate(GROUPS, layout="packed", pad=PAD))[0]
        fresh = four_bits(folder, dtype)
        start = own_rows(fresh)
        loaded = PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
        again = own_rows(loaded)
    assert torch.allclose(ours, again.float(), rtol=close)
    assert float((again - start).abs().max()) > 0.5
    # and on the base as it was before it was quantised, which is what a run's merged model is made of
    whole = PeftModel.from_pretrained(llama(**WIDE), str(tmp_path)).eval()
    prepare(whole.get_base_model())
    with torch.no_grad():
        chosen, rejected = (response_logps(whole, batch)[0][batch[side]] for side in ("chosen", "rejected"))
    assert float((chosen - rejected).mean()) > 0.5


@bitsandbytes
def test_a_model_that_is_evaluated_in_between_trains_as_before(tmp_path: Path, folder: Path) -> None:
    """The guard's probes do that. On a CPU with AVX512-BF16, bitsandbytes would repack the weights then, and lose the gradient."""

    def gradient_of(evaluate: bool) -> Tensor:
        trainer = trainer_for(tmp_path, four_bits(folder), peft_config=adapter())
        if evaluate:
            trainer.model.eval()
            with torch.no_grad():
                own_rows(trainer.model)
            trainer.model.train()
        step(trainer, split(GROUPS, 2))
        return torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])

    assert float(gradient_of(False).norm()) > 0.01
    assert torch.equal(gradient_of(True), gradient_of(False))


@bitsandbytes
def test_a_model_that_was_repacked_before_is_refused(tmp_path: Path, folder: Path) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks only on a CPU with AVX512-BF16")
    model = four_bits(folder).eval()
    for module in model.modules():  # as it comes from plain transformers
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        own_rows(model)
    with pytest.raises(ModelError, match="repacked its four-bit weights") as e:
        trainer_for(tmp_path, model, peft_config=adapter())
    assert "load it again" in e.value.hint


@bitsandbytes
@pytest.mark.model
def test_the_demo_model_trains_in_four_bits(tmp_path: Path, demo_folder: Path) -> None:
    model = four_bits(demo_folder)
    body = sum(p.numel() for n, p in model.named_parameters() if p.dtype == torch.uint8)
    assert body * 2 == 106_168_320  # 30 layers of 2*576*576 (q, o), 2*192*576 (k, v), 3*1536*576: two weights a byte
    rows = [
        {"prompt": "Name a colour.", "chosen": " Blue, like the sky.", "rejected": " I do not know any.", "gap": 2.0},
        {"prompt": "Name a fruit.", "chosen": " An apple.", "rejected": " Stones are fruits.", "gap": 3.0},
    ]
    from transformers import AutoTokenizer

    from spalign.training.trainer import SPAConfig, SPATrainer

    args = SPAConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SPATrainer(model, args, rows, AutoTokenizer.from_pretrained(demo_folder), peft_config=adapter(r=8))
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.7 * losses[0]


@bitsandbytes
def test_a_device_that_is_not_there_is_an_error_with_a_hint(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot be put on 'cuda:99'") as e:
        load_model(str(folder), EngineConfig(device="cuda:99"), dtype="nf4")
    assert "engine.device" in e.value.hint


@bitsandbytes
def test_two_processes_train_on_four_bits_what_one_does(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lora = {"lora": {"r": 4, "base_dtype": "nf4"}, "guard": NO_LIMITS | {"prompts": 4}}  # of one, the answer is empty
    start = load_file(tiny_model / "model.safetensors")
    found = []
    for together in (False, True):
        stage = trained(config(tmp_path / str(together), tiny_model, together, **lora))
        found.append(load_file(stage / "model/model.safetensors"))
    moved = [torch.cat([(m[k] - start[k]).reshape(-1) for k in sorted(start)]) for m in found]
    assert float(moved[0].abs().max()) > 1e-3
    assert gap(moved[1], moved[0]) < 1e-3


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_base_in_four_bits_is_not_sharded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_file, "find_spec", lambda _: True)  # whether DeepSpeed is installed does not matter here
    file = Path(__file__).parents[2] / f"configs/accelerate/{name}.yaml"
    wanted = config_from({"name": "a", "train": {"accelerate": str(file), "lora": {"base_dtype": "nf4"}}})
    with pytest.raises(ConfigError, match="a base in four bits is not spread over processes") as e:
        launch_file.check_launch(wanted)
    assert "ddp.yaml" in e.value.hint


def test_without_bitsandbytes_a_run_is_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spalign.pipeline import run

    found = importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a))
    wanted = config_from({"name": "a", "runs_dir": str(tmp_path), "train": {"lora": {"base_dtype": "nf4"}}})
    with pytest.raises(ModelError, match=r"four bits \(train.lora.base_dtype=nf4\) need bitsandbytes") as e:
        run(wanted)
    assert "spalign[qlora]" in e.value.hint
    assert e.value.exit_code == 2
    assert not list(tmp_path.iterdir())
