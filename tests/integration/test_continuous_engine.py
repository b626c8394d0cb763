"""Transformers' continuous batching, on the CPU, against static batches: the same answers in float32, whatever runs beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, MistralForCausalLM
from transformers.generation.continuous_batching import continuous_api

from spalign.config import EngineConfig, config_from
from spalign.engines import continuous, flash
from spalign.engines.base import Batching, Completion, GenerateRequest, Sampling
from spalign.engines.continuous import ContinuousEngine, load_for_gpu
from spalign.engines.make import load_engine
from spalign.engines.transformers import TransformersEngine
from spalign.errors import ConfigError, EngineError
from spalign.types import Message

pytestmark = pytest.mark.model

HERE = EngineConfig(dtype="float32", device="cpu", batch_size=5, batching="static")
SIDE_BY_SIDE = HERE.model_copy(update={"batching": "continuous"})


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), HERE)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> ContinuousEngine:
    engine = load_engine(str(tiny_model), SIDE_BY_SIDE)
    assert isinstance(engine, ContinuousEngine)
    return engine


def requests(how: Sampling, count: int = 7) -> list[GenerateRequest]:
    texts = [f"Say {n} in {n % 3} words" + " please" * (11 * n) for n in range(count)]
    return [GenerateRequest(str(n), (Message("user", text),), (n, n + 1), how) for n, text in enumerate(texts)]


def by_place(completions: list[Completion]) -> dict[tuple[str, int], Completion]:
    found = {(c.request_id, c.index): c for c in completions}
    assert len(found) == len(completions)
    return found


@pytest.mark.parametrize("how", [Sampling(0.0, 1.0, 40), Sampling(1.0, 1.0, 40), Sampling(0.8, 0.9, 70), Sampling(1.0, 0.95, 1)])
def test_answers_are_those_of_static_batches(engine: ContinuousEngine, plain: TransformersEngine, how: Sampling):
    want = by_place(list(plain.generate(requests(how))))
    assert by_place(list(engine.generate(requests(how)))) == want
    # a call may mix ways of sampling; and the model answers as before afterwards
    mixed = [*requests(how), *(GenerateRequest(f"greedy {r.id}", r.messages, r.seeds, Sampling(0.0, 1.0, 3)) for r in requests(how))]
    got = by_place(list(engine.generate(mixed)))
    assert {key: c for key, c in got.items() if "greedy" not in key[0]} == want
    assert len(got) == 2 * len(want)
    assert by_place(list(TransformersEngine.generate(engine, requests(how)))) == want


def reference(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int]
) -> Tensor:
    """What `flash.kernel` gives, sequence by sequence: q (tokens, heads, dim); k, v (cached and new tokens, kv heads, dim)."""
    assert window_size[1] == 0
    out = torch.empty_like(q)
    for begin, end, first, last in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        assert 0 < end - begin <= max_q
        assert end - begin <= last - first <= max_k
        ahead = torch.arange(last - first - (end - begin), last - first)[:, None] - torch.arange(last - first)
        seen = (ahead >= 0) & (ahead <= (window_size[0] if window_size[0] >= 0 else last - first))
        own = (x.transpose(0, 1) for x in (q[begin:end], k[first:last], v[first:last]))
        out[begin:end] = scaled_dot_product_attention(*own, attn_mask=seen, scale=scale, enable_gqa=True).transpose(0, 1)
    return out


def shape(name: str) -> dict[str, Any]:
    """What a Mistral has in common with the Llama of this name."""
    return {k: v for k, v in LlamaConfig.from_pretrained(name).to_diff_dict().items() if k not in ("model_type", "architectures")}


@pytest.mark.parametrize("window", [None, 20])
def test_with_pytorch_s_flash_attention(tiny_model: Path, tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is for GPUs (`test_cuda.py`); what it is given and what becomes of it is seen with a reference of it."""
    name = str(tiny_model)
    if window is not None:
        MistralForCausalLM.from_pretrained(name, config=MistralConfig(**shape(name), sliding_window=window)).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(name).save_pretrained(tmp_path)
        name = str(tmp_path)
    calls = []
    monkeypatch.setattr(continuous, "_attention", lambda _: flash.register())
    monkeypatch.setattr(flash, "kernel", lambda *a, **how: calls.append(how["window_size"]) or reference(*a, **how))
    engine, plain = ContinuousEngine.load(name, SIDE_BY_SIDE), TransformersEngine.load(name, HERE)
    own = engine.model.config._attn_implementation
    for how in (Sampling(0.0, 1.0, 40), Sampling(1.0, 0.95, 30)):
        assert by_place(list(engine.generate(requests(how)))) == by_place(list(plain.generate(requests(how))))
    assert set(calls) == {(-1 if window is None else window - 1, 0)}
    assert engine.model.config._attn_implementation == own
    with pytest.raises(ValueError, match="caps its attention scores"):
        flash.attention(
            engine.model, *(torch.zeros(1, 1, 1, 1),) * 3, None, cache=None, cu_seq_lens_q=torch.zeros(2), max_length_q=1, softcap=5.0
        )


@pytest.mark.parametrize(
    ("changes", "attention"),
    [
        ({}, flash.NAME),
        ({"dtype": torch.float32}, "sdpa"),
        ({"device": torch.device("cpu")}, "sdpa"),
        ({"hidden_size": 400}, "sdpa"),  # heads of 100
        ({"head_dim": 512}, "sdpa"),
        ({"_attn_implementation": "eager"}, "paged|eager"),  # a model that PyTorch's kernels do not compute
        ({"_attn_implementation": "eager", "installed": 2}, "flash_attention_2"),
        ({"_compatible_flash_implementations": ["kernels-community/another"], "installed": 2}, "sdpa"),
        ({"_supports_flash_attn": False}, "sdpa"),
        ({"_compatible_flash_implementations": ["kernels-community/another"]}, "sdpa"),
        ({"capability": (7, 5)}, "sdpa"),
        ({"torch": "2.10.0"}, "sdpa"),
        ({"installed": 2}, "flash_attention_2"),
        ({"installed": 2, "dtype": torch.float32}, "sdpa"),
        ({"installed": 3}, "flash_attention_3"),
    ],
)
def test_which_attention_the_pages_get(changes: dict[str, Any], attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "_supports_flash_attn": True, "_can_set_attn_implementation": lambda: True,
        "_compatible_flash_implementations": None, "hidden_size": 512, "num_attention_heads": 4, "head_dim": None,
        "_attn_implementation": "sdpa", "capability": (9, 0), "torch": "2.11.0", "installed": 0, **changes,
    }  # fmt: skip
    model = SimpleNamespace(**about)
    model.config = SimpleNamespace(get_text_config=lambda: model, _attn_implementation=about["_attn_implementation"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: about["capability"])
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(about["torch"]))
    for version in (2, 3):
        monkeypatch.setattr(continuous, f"is_flash_attn_{version}_available", lambda v=version: about["installed"] == v)
    assert continuous._attention(model) == attention


def test_a_model_that_pytorch_s_kernels_do_not_compute_keeps_its_own_attention(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        GptOssConfig(**shape(str(tiny_model)), num_local_experts=2, num_experts_per_tok=2, sliding_window=20)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    model.save_pretrained(tmp_path / "sinks")
    AutoModelForCausalLM.from_config(Gemma2Config(**shape(str(tiny_model)), attn_logit_softcapping=5.0)).save_pretrained(tmp_path / "caps")
    for folder in ("sinks", "caps"):
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / folder)
    engine, plain = ContinuousEngine.load(str(tmp_path / "sinks"), SIDE_BY_SIDE), TransformersEngine.load(str(tmp_path / "sinks"), HERE)
    how = Sampling(0.0, 1.0, 30)
    want = by_place(list(plain.generate(requests(how))))
    assert by_place(list(engine.generate(requests(how)))) == want
    assert engine.model.config._attn_implementation == plain.model.config._attn_implementation == "eager"
    for layer in plain.model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)
    assert by_place(list(plain.generate(requests(how)))) != want  # they count

    with pytest.raises(ConfigError, match="Gemma2ForCausalLM caps its attention scores: continuous batching needs flash-attn") as e:
        ContinuousEngine.load(str(tmp_path / "caps"), SIDE_BY_SIDE)
    assert e.value.hint == "engine.batching=static"


def test_answers_come_as_they_end_and_a_caller_may_leave(engine: ContinuousEngine, plain: TransformersEngine):
    short = GenerateRequest("short", (Message("user", "a"),), (4,), Sampling(1.0, 1.0, 2))
    long = GenerateRequest("long", (Message("user", "a"),), (4,), Sampling(1.0, 1.0, 900))
    answers = engine.generate([long, short])
    assert next(answers).request_id == "short"
    answers.close()  # type: ignore[attr-defined]
    assert by_place(list(engine.generate([short]))) == by_place(list(plain.generate([short])))


def test_sequences_that_are_put_back_for_want_of_memory_keep_their_numbers(
    engine: ContinuousEngine, plain: TransformersEngine, monkeypatch: pytest.MonkeyPatch
):
    how = Sampling(1.0, 0.9, 150)  # the tail of a random model is so flat that the last bit of a sum decides there
    whole = engine._settings
    for one in (engine, plain):
        monkeypatch.setattr(one.tokens, "eos", {49_151})  # they go on to the limit

    def settings(work):
        found = whole(work)
        found.num_blocks = 10  # of 32 tokens; one sequence needs up to eight
        return found

    put_back = []
    states = continuous.RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        continuous.RequestState, "create_equivalent_initial_request", lambda state: put_back.append(state.request_id) or states(state)
    )
    monkeypatch.setattr(engine, "_settings", settings)
    assert by_place(list(engine.generate(requests(how, 5)))) == by_place(list(plain.generate(requests(how, 5))))
    assert put_back


def test_a_failure_is_an_error_not_an_answer(engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch):
    def fails(steps: object) -> None:
        steps.fail_all_requests(MemoryError("no\x1b[2J room"))  # as it does itself with requests that it cannot go on with

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    asked, attention = requests(Sampling(1.0, 1.0, 10)), engine.model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(continuous_api.ContinuousBatchProcessor, "update_batch", fails)
        with pytest.raises(EngineError, match=r"continuous batching failed on prompt '\d': no.* room\n  fix: if it is short of memory"):
            list(engine.generate(asked))
    with monkeypatch.context() as patch:
        patch.setattr(continuous_api.ContinuousBatchProcessor, "_generation_step", out_of_memory)
        with pytest.raises(EngineError, match="continuous batching failed as a whole: CUDA out of memory"):
            list(engine.generate(asked))
    assert len(list(engine.generate(asked))) == 14  # the next call is not harmed
    assert engine.model.config._attn_implementation == attention


def test_a_prompt_longer_than_the_window_is_refused_before_any_work(engine: ContinuousEngine):
    long = GenerateRequest("long one", (Message("user", "word " * 3000),), (1,), Sampling(1.0, 1.0, 8))
    with pytest.raises(EngineError, match=r"prompt 'long one' has .* exceeds the model's window of 2048"):
        list(engine.generate([*requests(Sampling(1.0, 1.0, 8)), long]))


def test_it_is_not_taken_for_one_whose_batches_can_run_again(engine: ContinuousEngine, plain: TransformersEngine):
    assert isinstance(plain, Batching)
    assert not isinstance(engine, Batching)


def test_by_default_where_a_flash_kernel_runs_the_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """`test_cuda.py` has it on a GPU."""
    auto = HERE.model_copy(update={"batching": "auto"})
    assert EngineConfig().batching == "auto"
    assert auto.matters() == HERE.matters()
    name = str(tiny_model)
    assert type(load_engine(name, auto)) is TransformersEngine
    assert type(load_for_gpu(name, auto)) is TransformersEngine  # float32 has no flash kernel
    monkeypatch.setattr(continuous, "_attention", lambda _: flash.NAME)
    engine = load_for_gpu(name, auto.model_copy(update={"memory": 0.5}))
    assert isinstance(engine, ContinuousEngine)
    assert (engine.memory, engine.batch_size) == (0.5, auto.batch_size)
    with pytest.raises(ConfigError, match=r"engine.memory 3.0: it is a share of the GPU's free memory, at most 1"):
        load_for_gpu(name, auto.model_copy(update={"memory": 3.0}))
    monkeypatch.setattr(continuous, "capped", lambda _: True)
    assert type(load_for_gpu(name, auto)) is TransformersEngine


def test_where_it_can_be_asked_for():
    with pytest.raises(ConfigError, match="hidden_states is an option of kind vllm"):
        config_from({"name": "x", "engine": {"hidden_states": True}})
    assert SIDE_BY_SIDE.matters() != HERE.matters()
    ray = {"kind": "ray", "batching": "continuous"}
    assert config_from({"name": "x", "engine": ray}).engine.in_worker().batching == "continuous"
    for kind in ({"kind": "vllm"}, {"kind": "ray", "worker": "vllm"}, {"kind": "openai", "base_url": "http://localhost:1/v1"}):
        with pytest.raises(ConfigError, match="batching: continuous is an option of kind transformers"):
            config_from({"name": "x", "engine": {**kind, "batching": "continuous"}})
