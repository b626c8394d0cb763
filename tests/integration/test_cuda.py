"""What only a GPU can show: the kernels that run there give the numbers of the CPU. Skipped where there is none.

Models are small and random, and bring their own tokenizer, so nothing but CUDA is needed: pytest tests/integration/test_cuda.py
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_qlora import WIDE, adapter, bitsandbytes, dequantised, four_bits, gap_to, saved
from test_trainer import BOS, GROUPS, PAD, eq3, gap, gradient, ids, llama, own_rows, split, step, trainer_for
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spalign.config import EngineConfig
from spalign.engines import continuous, flash
from spalign.engines.base import Completion, GenerateRequest, Sampling
from spalign.engines.continuous import ContinuousEngine
from spalign.engines.make import load_engine
from spalign.engines.transformers import TransformersEngine
from spalign.training.batches import collate, moved, prepare, response_logps
from spalign.training.groups import TrainingGroup
from spalign.training.norms import rms_norm
from spalign.training.trainer import SPATrainer
from spalign.types import Message

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Attention = Literal["rows", "flex"]
LAYOUT = {"rows": "packed", "flex": "flex"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its heads of 16 are the least that flex attention's kernel takes."""
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def groups(prompt: int) -> list[TrainingGroup]:
    return [replace(g, prompt=(BOS, *ids(random.Random(i), prompt + i))) for i, g in enumerate(GROUPS)]


@pytest.mark.parametrize("attention", ["rows", "flex"])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 7})])
@pytest.mark.parametrize("prompt", [3, 70])  # repeated before each response, or seen through a mask
def test_the_numbers_of_a_row_of_its_own_on_the_cpu(family: str, changes: dict[str, int], attention: Attention, prompt: int) -> None:
    torch.manual_seed(0)
    shape = llama(**WIDE).config.to_diff_dict() | changes
    shape.pop("model_type")
    shape.pop("architectures", None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    there = copy.deepcopy(model).cuda()
    mine = groups(prompt)
    plain = own_rows(model, mine)
    pull = torch.linspace(-1, 2, len(plain))
    (plain * pull).sum().backward()
    assert prepare(there, attention) == LAYOUT[attention]
    means, _ = response_logps(there, moved(collate(mine, layout=LAYOUT[attention], pad=PAD), there.device))  # type: ignore[arg-type]
    assert float(((means.cpu() - plain) / plain).detach().abs().max()) < 2e-5
    (means * pull.cuda()).sum().backward()
    assert gap(gradient_there(there), gradient(model)) < 1e-4


def gradient_there(model: torch.nn.Module) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).cpu() for p in model.parameters()])


def on_gpu(trainer: SPATrainer, attention: Attention) -> float:
    """Loss of one step of two micro-batches; the gradients stay with the weights."""
    batches = [trainer._prepare_inputs(b) for b in split(GROUPS, 2, LAYOUT[attention])]  # type: ignore[arg-type]
    got, _ = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    with trainer.compute_loss_context_manager():
        losses = [trainer.compute_loss(trainer.model, batch) for batch in got]
    torch.stack(losses).sum().backward()
    return sum(float(x.detach()) for x in losses)


@pytest.mark.parametrize("attention", ["rows", "flex"])
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=["fp32", "checkpointing", "bf16"])
def test_a_step_of_the_trainer(tmp_path: Path, attention: Attention, how: dict[str, bool]) -> None:
    reference = llama(**WIDE)
    loss = eq3(reference, GROUPS)
    loss.backward()
    trainer = trainer_for(tmp_path, llama(**WIDE), attention=attention, use_cpu=False, **how)
    assert trainer.model.device.type == "cuda"
    if "gradient_checkpointing" in how:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    got = on_gpu(trainer, attention)
    exact = "bf16" not in how
    assert got == pytest.approx(float(loss.detach()), rel=1e-5 if exact else 0.02)
    assert gap(gradient_there(trainer.model), gradient(reference)) < (1e-4 if exact else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [False, True])  # a norm of each head's queries, which lie apart in memory
def test_rms_norm_s_kernel(dtype: torch.dtype, heads: bool) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 7, 3, 64, device="cuda").to(dtype)
    x = (x.transpose(1, 2) if heads else x).detach().requires_grad_()
    got, want = rms_norm(x, norm.weight, 1e-5), norm(x)
    pull = torch.randn_like(want)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(got, want, **close)
    grads = [torch.autograd.grad((y * pull).sum(), (x, norm.weight)) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=close["rtol"], atol=10 * close["atol"])


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_of_an_adapter(tmp_path: Path, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(**changes: Any) -> SPATrainer:
        return trainer_for(tmp_path, llama(**WIDE), peft_config=adapter(init_lora_weights=False), **changes)

    with monkeypatch.context() as patch:
        patch.setattr("spalign.training.trainer.fuse_adapters", lambda _: None)
        loss, there = step(trainer(), split(GROUPS, 2))
    here = trainer(use_cpu=False, bf16=bf16)
    assert on_gpu(here, "rows") == pytest.approx(loss, rel=0.02 if bf16 else 1e-5)
    assert gap(gradient_there(here.model), there) < (0.1 if bf16 else 1e-4)


@pytest.mark.parametrize("attention", ["rows", "flex"])
def test_training_goes_down_and_comes_back(tmp_path: Path, attention: Attention) -> None:
    trainer = trainer_for(
        tmp_path, llama(**WIDE), attention=attention, use_cpu=False, bf16=True, max_steps=6, learning_rate=1e-2,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.5 * losses[0]


# -- four bits ---------------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("attention", ["rows", "flex"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_gradient_on_four_bits_is_that_of_the_dequantised_base(tmp_path: Path, folder: Path, dora: bool, attention: Attention) -> None:
    model = four_bits(folder, device="cuda")
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) == 14
    plain = dequantised(model)
    changes = {"init_lora_weights": False, "use_dora": dora}
    trainer = trainer_for(tmp_path, model, peft_config=adapter(**changes), use_cpu=False, attention=attention)
    assert gap_to(plain, trainer, changes, lambda: on_gpu(trainer, attention)) < 1e-4


# -- generating --------------------------------------------------------------------------------------------------------


def asked(how: Sampling, count: int = 9) -> list[GenerateRequest]:
    texts = [" ".join(f"w{4 + (7 * n + i) % 190}" for i in range(1 + 6 * (n % 9))) for n in range(count)]
    return [GenerateRequest(str(n), (Message("user", text),), (n, n + 1), how) for n, text in enumerate(texts)]


def answers(engine: TransformersEngine, requests: list[GenerateRequest]) -> dict[tuple[str, int], tuple[int, ...]]:
    found: list[Completion] = list(engine.generate(requests))
    return {(c.request_id, c.index): tuple(c.token_ids) for c in found}


def loaded(folder: Path, kind: type[TransformersEngine], device: str, dtype: Literal["float32", "bfloat16"]) -> Any:
    batching: Literal["static", "continuous"] = "continuous" if kind is ContinuousEngine else "static"
    return kind.load(str(folder), EngineConfig(device=device, dtype=dtype, batch_size=5, batching=batching))


@pytest.mark.parametrize("kind", [TransformersEngine, ContinuousEngine])
@pytest.mark.parametrize("how", [Sampling(0.0, 1.0, 40), Sampling(1.0, 0.95, 40), Sampling(0.7, 1.0, 1)])
def test_answers_in_float32_are_those_of_the_cpu(folder: Path, kind: type[TransformersEngine], how: Sampling) -> None:
    want = answers(loaded(folder, TransformersEngine, "cpu", "float32"), asked(how))
    got = answers(loaded(folder, kind, "cuda", "float32"), asked(how))
    assert got.keys() == want.keys()
    assert sum(got[k] != want[k] for k in want) <= 1  # the last bit of a sum may turn a draw


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (8, 2, 64), (4, 1, 128)])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("new", [[1, 1, 1, 1], [5, 1, 17, 1]])
def test_pytorch_s_flash_kernel_on_pages(heads: int, kv_heads: int, dim: int, window: int | None, new: list[int]) -> None:
    torch.manual_seed(0)
    whole = [3 + n for n in new[:1]] + [n + 40 * i for i, n in enumerate(new[1:], 1)]
    q = torch.randn(sum(new), heads, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(sum(whole), kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ends = [torch.tensor([0, *n], device="cuda").cumsum(0).to(torch.int32) for n in (new, whole)]
    how = {"scale": dim**-0.5, "window_size": (-1 if window is None else window - 1, 0)}
    out = flash.kernel(q, k, v, *ends, max(new), max(whole), **how)
    for i, (n, m) in enumerate(zip(new, whole, strict=True)):
        own_q = q[ends[0][i] : ends[0][i + 1]].double().transpose(0, 1)
        own_k, own_v = (x[ends[1][i] : ends[1][i + 1]].double().transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for x in (k, v))
        ahead = torch.arange(m - n, m, device="cuda")[:, None] - torch.arange(m, device="cuda")
        hidden = (ahead < 0) | ((ahead >= window) if window is not None else False)
        want = (own_q @ own_k.transpose(1, 2) * dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ own_v
        assert gap(out[ends[0][i] : ends[0][i + 1]].double(), want.transpose(0, 1)) < 1e-2


def test_continuous_batching_is_the_default_where_the_gpu_has_a_flash_kernel(folder: Path) -> None:
    for dtype, kind in (("bfloat16", ContinuousEngine), ("float32", TransformersEngine)):
        assert type(load_engine(str(folder), EngineConfig(device="cuda", dtype=dtype))) is kind


def test_continuous_batching_in_bfloat16(folder: Path) -> None:
    """By PyTorch's flash attention; rounding turns a draw now and then, and what follows it. The memory of the pages comes back."""
    static, engine = (loaded(folder, kind, "cuda", "bfloat16") for kind in (TransformersEngine, ContinuousEngine))
    assert continuous._attention(engine.model) in (flash.NAME, "flash_attention_2", "flash_attention_3")
    before, own = torch.cuda.memory_allocated(), engine.model.config._attn_implementation
    how = Sampling(0.0, 1.0, 6)
    got, want = answers(engine, asked(how, 40)), answers(static, asked(how, 40))
    assert got.keys() == want.keys()
    assert sum(got[k] == want[k] for k in want) > 0.8 * len(want)
    assert torch.cuda.memory_allocated() - before < 1 << 27  # 32 MB of cuBLAS for the steps' stream stay; pages were most of the GPU
    assert engine.model.config._attn_implementation == own


def test_scores_are_those_of_the_cpu(folder: Path) -> None:
    here, there = (loaded(folder, TransformersEngine, device, "float32") for device in ("cpu", "cuda"))
    texts = [" ".join(f"w{4 + (5 * n + i) % 190}" for i in range(2 + 9 * n)) for n in range(6)]
    asks = [(Message("user", t),) for t in texts]
    for got, want in zip(*(e.choice_logprobs(asks, ["w7", "w9"]) for e in (there, here)), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    pairs = [(here.encode_chat(a), (5, 8, 11, 6)[: 1 + n % 4]) for n, a in enumerate(asks)]
    for got, want in zip(*(e.loglikelihood(pairs) for e in (there, here)), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
    for got, want in zip(*(e.representations(pairs, [0.5, 1.0]) for e in (there, here)), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
