"""The transformers engine with transformers' own continuous batching: a sequence that ends makes room for the next one at once.

Made for CUDA, where batches are large and long answers leave most of a static batch idle; on a CPU it runs (so it can be tested) and is
slower than static batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from spalign.config import EngineConfig
from spalign.engines import flash
from spalign.engines.attention import capped
from spalign.engines.base import Completion, GenerateRequest
from spalign.engines.sampling import next_tokens, uniforms
from spalign.engines.transformers import TransformersEngine
from spalign.errors import ConfigError, EngineError
from spalign.text import printable, shorten

_PAGE = {True: 32, False: 256}  # tokens, on a CPU and elsewhere
_PASS_TOKENS = 1024  # on a CPU; elsewhere the memory says

Work = list[tuple[list[int], GenerateRequest, int]]


class ContinuousEngine(TransformersEngine):
    """Generates as said above; everything else, and what a completion depends on, is the TransformersEngine's, up to rounding.

    Transformers drops what it does not know of a request's sampling, hands failed requests back as if they were done, and keeps the
    memory of its pages while it lives. Here the draw is ours (one random number a token, by seed and position), a failure is an
    EngineError, and the pages go after every call.
    """

    name = "transformers"
    batches = None  # type: ignore[assignment]  # what runs side by side is not known beforehand: it is no `Batching`
    memory: float | None = None

    @classmethod
    def load(cls, name: str, config: EngineConfig) -> ContinuousEngine:
        """Raises ConfigError where the model cannot be run so, ModelError where it cannot be loaded."""
        engine = super().load(name, config)
        assert isinstance(engine, ContinuousEngine)
        if why := lacks(engine.model):
            raise ConfigError(why, hint="engine.batching=static")
        engine.memory = _share(config.memory)
        return engine

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        work = self._work(requests)
        for how in dict.fromkeys((r.sampling.temperature, r.sampling.top_p) for _, r, _ in work):
            yield from self._side_by_side([w for w in work if (w[1].sampling.temperature, w[1].sampling.top_p) == how], *how)

    @torch.inference_mode()
    def _side_by_side(self, work: Work, temperature: float, top_p: float) -> Iterator[Completion]:
        with self._manager(work, _SeededDraw(temperature, top_p)) as manager:
            for n, (ids, request, i) in enumerate(work):
                limit = request.sampling.max_new_tokens
                draw = {"numbers": uniforms(request.seeds[i], limit), "prompt": len(ids)}
                manager.add_request(ids, str(n), max_new_tokens=limit, eos_token_id=sorted(self.tokens.eos), **draw)
            steps, results, left = manager.batch_processor, manager.output_router.output_queue, len(work)
            while left:
                with _told(), _on(self.model.device):
                    if not steps.prepare_next_batch():
                        raise RuntimeError("there is work, and nothing was planned")
                    steps._generation_step(self.model)
                    steps.update_batch()
                while not results.empty():
                    result = results.get_nowait()
                    _, request, i = work[int(result.request_id)]
                    if result.error is not None:
                        raise _failed(f"on prompt '{printable(request.id)}'", result.error)
                    left -= 1
                    yield self._completion(request, i, result.generated_tokens)

    @contextmanager
    def _manager(self, work: Work, draw: _SeededDraw) -> Iterator[Any]:
        """Ready, and gone afterwards with its memory. Its thread is not started: its steps are taken here, so that errors and interrupts
        are this call's, and a caller who stops listening leaves nothing behind."""
        model: Any = self.model
        attention = model.config._attn_implementation
        _use(model, _attention(model))
        try:
            eos = sorted(self.tokens.eos)
            manager = model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=self._pad), self._settings(work)
            )
            own = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([draw]))
            own.tensors_required = 1
            manager.logit_processor = own
            with _told(), _on(model.device):  # where it looks for free memory
                manager.batch_processor = manager._create_batch_processor()
            yield manager
        finally:
            _use(model, attention)

    def _settings(self, work: Work) -> ContinuousBatchingConfig:
        cpu = self.model.device.type == "cpu"
        rows = min(self.batch_size, len(work))
        longest = max(len(ids) + request.sampling.max_new_tokens for ids, request, _ in work)
        page = _PAGE[cpu]
        sized = {"num_blocks": rows * (math.ceil(longest / page) + 1), "max_batch_tokens": max(_PASS_TOKENS, rows)} if cpu else {}
        return ContinuousBatchingConfig(
            page_size=page,
            max_requests_per_batch=rows,
            max_memory_percent=None if cpu else self.memory,
            # the draw looks at the tokens of this step, and at how many there are before the next one is planned
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
            **sized,
        )


def load_for_gpu(name: str, config: EngineConfig) -> TransformersEngine:
    """`batching: auto`: a ContinuousEngine where a flash kernel runs the model, else static batches."""
    static = TransformersEngine.load(name, config)
    if "flash" not in _attention(static.model) or lacks(static.model):
        return static
    engine = ContinuousEngine(static.model, static.tokens.tokenizer, batch_size=config.batch_size)
    engine.memory = _share(config.memory)
    return engine


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """As the current device, as transformers' own thread has it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def lacks(model: Any) -> str:
    """Why the model cannot be run with continuous batching, in words; empty: it can."""
    kind = type(model).__name__
    if not (model._can_set_attn_implementation() and model._supports_attention_backend):
        return f"{kind} takes no attention over pages"
    if capped(model.config) and "flash_attention" not in _attention(model):
        return f"{kind} caps its attention scores: continuous batching needs flash-attn for that"
    return ""


def _share(memory: float | None) -> float | None:
    if memory is not None and memory > 1:
        raise ConfigError(f"engine.memory {memory}: it is a share of the GPU's free memory, at most 1", hint="for example 0.5")
    return memory


class _SeededDraw(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses each token itself and leaves the engine, which is greedy, no other choice."""

    supported_kwargs: dict[str, type] = {"numbers": object, "prompt": int}  # noqa: RUF012
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """The random number of each sequence's next token; the storage is int32, whatever it means."""
        drawn = []
        for request in requests_with_new_token:
            state: RequestState = request.state
            told = state.logit_processor_kwargs
            # one that was put back for want of memory has what it had generated among its initial tokens
            drawn.append(told["numbers"][len(state.initial_tokens) - told["prompt"] + len(state.generated_tokens)])
        return torch.tensor(drawn, dtype=torch.float32).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """scores: (rows, vocabulary) in float32."""
        u = tensor_arg[: len(scores)].view(torch.float32)
        chosen = next_tokens(scores, u, temperature=self.temperature, top_p=self.top_p)
        return scores.scatter(-1, chosen.unsqueeze(-1), torch.finfo(scores.dtype).max)


def _attention(model: Any) -> str:
    """What continuous batching takes for its pages: flash attention where it is installed, else PyTorch's; never a kernel from the hub."""
    plain = model.config._attn_implementation == "eager"  # see `faithful`
    if model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16):
        own = getattr(model, "_compatible_flash_implementations", None)  # such a model takes no other: kernels from the hub
        if model._supports_flash_attn and own is None and is_flash_attn_3_available():
            return "flash_attention_3"
        if model._supports_flash_attn and own is None and is_flash_attn_2_available():
            return "flash_attention_2"
        if not plain and flash.serves(model):
            return flash.register()
    return "paged|eager" if plain else "sdpa"


def _use(model: Any, attention: str) -> None:
    if flash.NAME in (attention, model.config._attn_implementation):
        model.config._attn_implementation = attention  # see `flash.register`
    else:
        model.set_attn_implementation(attention)


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong in transformers' own steps, a lack of memory above all, as an EngineError."""
    try:
        yield
    except (AttributeError, MemoryError, RuntimeError, TypeError, ValueError) as e:
        raise _failed("as a whole", str(e) or type(e).__name__) from e


def _failed(where: str, why: str) -> EngineError:
    return EngineError(
        f"transformers' continuous batching failed {where}: {shorten(printable(' '.join(why.split())), 300)}",
        hint="if it is short of memory, lower engine.batch_size or engine.memory; engine.batching=static runs any model",
    )
