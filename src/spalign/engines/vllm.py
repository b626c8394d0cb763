"""The vLLM engine: continuous batching and a cache of prompt beginnings, in a process of its own. Freeing it ends the process."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spalign.config import EngineConfig
from spalign.config.engine import VLLM_RANKS
from spalign.engines.base import Ask, Capability, Completion, GenerateRequest
from spalign.engines.loading import device_of, inference_dtype, load_tokens
from spalign.engines.make import give_memory_back
from spalign.engines.models import resolve
from spalign.engines.prefix_tree import Tokens
from spalign.engines.tokens import TokenEngine
from spalign.engines.transformers import TransformersEngine
from spalign.engines.vllm_client import VLLMProcess, was_closed
from spalign.engines.vllm_process import Done, Job
from spalign.errors import ConfigError, EngineError

_KV_GIB = 4.0  # for keys and values on a CPU
_GPU_SHARE = {False: 0.9, True: 0.6}  # with hidden states the weights are there twice
_BLOCK = 32  # tokens; what prompts share is reused in whole blocks, and vLLM's 128 on CPUs is longer than most of our prompts


def check_vllm(config: EngineConfig) -> None:
    """Raises, before any model is loaded, where vLLM cannot be used."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "engine.kind is vllm, and the package vllm is not installed",
            hint="on a GPU machine: pip install 'spalign[vllm]'; on a CPU: make setup ENGINE=vllm (docs/engines.md); "
            "or engine.kind=transformers",
        )
    device = device_of(config)
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device '{device}': the vLLM engine runs on cpu and cuda", hint="set engine.kind=transformers")
    if device != "cpu" and config.memory is not None and config.memory > 1:
        raise ConfigError(
            f"engine.memory {config.memory}: on a GPU it is a share of its memory, at most 1", hint="for example engine.memory=0.45"
        )


class VLLMEngine(TokenEngine):
    """Completions stream out as they finish; what prompts begin with alike runs once, also across calls.

    Takes calls of several threads at the same time (`width`): sequences of the later ones run where those of the earlier have ended.
    With only two, places stay empty where a part has few more sequences than run at a time.

    A completion depends on prompt and seed up to rounding: in bfloat16 the last bits depend on what runs beside it, and now and then they
    turn a token. prompt_tokens, cached_tokens: counted over all calls.
    """

    name = "vllm"
    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood"})
    width = 4

    def __init__(self, name: str, config: EngineConfig, *, adapter: Path | None = None, whole: str | None = None) -> None:
        """Load a model by name (see `spalign.engines.models`). Raises ModelError or EngineError with what to do.

        adapter: folder of a LoRA adapter on that model, as PEFT writes it; it is not merged. whole: the model with it merged, by name, for
        what vLLM does not show.
        """
        check_vllm(config)
        give_memory_back()
        where = resolve(name)
        self.tokens, limit = load_tokens(name, config)
        self._process = VLLMProcess(_settings(where, config) | _lora(adapter), _environment(config))
        self._window = min(self._process.window, limit or self._process.window)
        self.prompt_tokens = self.cached_tokens = 0
        self._counting, self._turn = threading.Lock(), threading.Lock()
        self.capabilities = self.capabilities_of(config)
        self._beside: TransformersEngine | None = None
        self._load_beside = partial(TransformersEngine.load, whole or name, config)

    @classmethod
    def capabilities_of(cls, config: EngineConfig) -> frozenset[Capability]:
        more: frozenset[Capability] = frozenset({"representations"}) if config.hidden_states else frozenset()
        return cls.capabilities | more

    def close(self) -> None:
        """End the process and give its memory back."""
        self._process.close()
        self._beside = None

    @property
    def window(self) -> int:
        return self._window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        work = self._work(requests)
        jobs = []
        for ids, request, i in work:
            how = request.sampling
            draw = (request.seeds[i], how.temperature, how.top_p) if how.temperature else None
            jobs.append(Job(tuple(ids), how.max_new_tokens, tuple(sorted(self.tokens.eos)), draw))
        for done in self._run(jobs):
            _, request, i = work[done.number]
            yield self._completion(request, i, done.tokens)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        if not asks:
            return []
        encoded = [self._encode_ask(a) for a in asks]
        choice_ids = tuple(self.tokens.one(c, chat=not isinstance(asks[0], str)) for c in choices)
        distinct = sorted({ids for ids in encoded if len(ids) < self.window})  # what begins alike is adjacent
        found: dict[Tokens, tuple[float, ...]] = {
            distinct[d.number]: d.weighed for d in self._run([Job(ids, weigh=choice_ids) for ids in distinct])
        }
        return [found.get(ids) for ids in encoded]

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        keys = self._fitting(requests)
        # the last token is weighed as the next one, so that it need not run
        jobs = [Job((*c, *y[:-1]), weigh=(y[-1],), read_from=len(c) if len(y) > 1 else None) for c, y in keys]
        found = {keys[d.number]: (*d.read, *d.weighed) for d in self._run(jobs)}
        return [found.get((tuple(c), tuple(y))) for c, y in requests]

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        """By transformers, which loads the model at the first call."""
        if "representations" not in self.capabilities:
            raise EngineError(
                "the vLLM engine does not show hidden states", hint="set engine.hidden_states=true (docs/engines.md), or use another scorer"
            )
        with self._turn:
            if not self._process.close.alive:
                raise was_closed()
            self._beside = self._beside or self._load_beside()
            return self._beside.representations(requests, depths)

    def _run(self, jobs: list[Job]) -> Iterator[Done]:
        for done in self._process.run(jobs):
            with self._counting:
                self.prompt_tokens += len(jobs[done.number].ids)
                self.cached_tokens += done.cached
            yield done


def _settings(where: str, config: EngineConfig) -> dict[str, Any]:
    """Arguments of vllm.LLM. It gets token ids and gives token ids: text is turned into tokens here, as for the other engines."""
    cpu = device_of(config) == "cpu"
    settings: dict[str, Any] = {
        "model": where,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling defaults of the model's
        "load_format": "safetensors",
        "dtype": str(inference_dtype(config)).removeprefix("torch."),
        "trust_remote_code": config.trust_remote_code,
        "max_num_seqs": config.batch_size,
        "max_model_len": -1,  # the model's, or what fits into the memory
        "enable_prefix_caching": True,
        "logits_processors": ["spalign.engines.vllm_sampler:SeededSampler"],
        "disable_log_stats": True,
        "seed": 0,
    }
    if cpu:
        kv = int((config.memory or _KV_GIB) * 2**30)
        settings |= {"enforce_eager": True, "block_size": _BLOCK, "kv_cache_memory_bytes": kv}
    else:
        settings |= {"gpu_memory_utilization": config.memory or _GPU_SHARE[config.hidden_states]}
    return settings


def _lora(adapter: Path | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    told = json.loads((adapter / "adapter_config.json").read_text())
    rank, modules = int(told["r"]), told["target_modules"]
    modules = sorted({str(m).rpartition(".")[2] for m in modules}) if isinstance(modules, list) else None  # else a pattern
    taken = next((r for r in VLLM_RANKS if r >= rank), None)
    if taken is None:
        raise EngineError(f"{adapter}: rank {rank} is more than vLLM takes ({VLLM_RANKS[-1]})", hint="set engine.kind=transformers")
    # the modules by name: else vLLM wraps the LM head too, and then fails where it weighs the tokens of several prompts
    return {"adapter": str(adapter), "enable_lora": True, "max_loras": 1, "max_lora_rank": taken, "lora_target_modules": modules}


def _environment(config: EngineConfig) -> dict[str, str]:
    """One process, no telemetry, and on a CPU Intel's OpenMP where it is installed: vLLM is made for it."""
    device = device_of(config)
    out = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second one takes no sampler from outside
    }
    if device == "cpu":
        out.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.exists() and "libiomp" not in out.get("LD_PRELOAD", ""):
            out["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), out.get("LD_PRELOAD")]))
            out.setdefault("KMP_BLOCKTIME", "5")  # milliseconds that a thread waits before it sleeps
    elif ":" in device:
        number = int(device.split(":")[1])
        visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        out["CUDA_VISIBLE_DEVICES"] = visible[number] if number < len(visible) else str(number)
    return out
