"""The process in which vLLM runs. It ends when its parent does, however that ends, and takes everything that it started with it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One sequence for vLLM.

    limit: most tokens to generate; ends: ids that end it. draw: (seed, temperature, top_p), None for greedy. weigh: tokens whose
    log-probability as the next one is wanted. read_from: log-probabilities of the prompt's own tokens from this position on are wanted.
    """

    ids: tuple[int, ...]
    limit: int = 1
    ends: tuple[int, ...] = ()
    draw: tuple[int, float, float] | None = None
    weigh: tuple[int, ...] = ()
    read_from: int | None = None


class Done(NamedTuple):
    """What became of job `number`. cached: tokens of the prompt that did not have to be run."""

    number: int
    tokens: tuple[int, ...]
    weighed: tuple[float, ...]
    read: tuple[float, ...]
    cached: int


class Ready(NamedTuple):
    """The model is loaded. window: as in `Engine.window`, as far as the memory goes."""

    window: int


class Failed(NamedTuple):
    message: str


def main(fd: int) -> None:
    """Load the model that the first message describes, then do every list of jobs that comes; a message during one ends it early."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(fd)
    try:
        settings = connection.recv()
        serve = Server(settings)
        connection.send(Ready(serve.window))
        while True:
            message = connection.recv()
            if isinstance(message, list):
                serve.do(message, connection)
    except EOFError:
        pass
    except BaseException as e:
        with contextlib.suppress(OSError):
            connection.send(Failed(f"{type(e).__name__}: {e}"))
        raise


def _end_with_parent() -> None:
    """Standard input is held open by the parent and never written to."""
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


class Server:
    """settings: arguments of vllm.LLM; `adapter`, where there is one, is the folder of a LoRA adapter that all jobs run with."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        adapter = settings.pop("adapter", None)
        self._lora = LoRARequest("policy", 1, adapter) if adapter else None
        self._engine = LLM(**settings).llm_engine

    @property
    def window(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def do(self, jobs: list[Job], connection: Connection) -> None:
        """Send a list of `Done` whenever some are, and None at the end."""
        for number in range(len(jobs)):
            self._add(jobs, number)
        try:
            while self._engine.has_unfinished_requests() and not connection.poll():
                finished = [o for o in self._engine.step() if o.finished]
                if done := [d for o in finished if (d := self._done(jobs, o)) is not None]:
                    connection.send(done)
        finally:
            left = [str(n) for n in range(len(jobs))] if self._engine.has_unfinished_requests() else []
            self._engine.abort_request(left)
        connection.send(None)

    def _add(self, jobs: list[Job], number: int, *, anew: bool = False) -> None:
        """anew: without what is remembered of earlier prompts."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from spalign.engines.vllm_sampler import ARGUMENT

        job = jobs[number]
        params = SamplingParams(
            temperature=0,
            max_tokens=job.limit,
            stop_token_ids=list(job.ends),
            logprob_token_ids=list(job.weigh) or None,
            prompt_logprobs=None if job.read_from is None else 0,
            skip_reading_prefix_cache=anew,
            extra_args={ARGUMENT: [*job.draw, job.limit]} if job.draw else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
            flat_logprobs=True,
        )
        self._engine.add_request(str(number), {"prompt_token_ids": list(job.ids)}, params, lora_request=self._lora)

    def _done(self, jobs: list[Job], out: Any) -> Done | None:
        """None where the job has to run again: of tokens that were remembered vLLM knows no log-probabilities."""
        number, job = int(out.request_id), jobs[int(out.request_id)]
        read: tuple[float, ...] = ()
        if job.read_from is not None:
            if (out.num_cached_tokens or 0) > job.read_from - 1:
                self._add(jobs, number, anew=True)
                return None
            own = out.prompt_logprobs
            at = [own.start_indices[i] for i in range(job.read_from, len(job.ids))]
            _check([own.token_ids[a] for a in at], job.ids[job.read_from :])
            read = tuple(own.logprobs[a] for a in at)
        (result,) = out.outputs
        weighed: tuple[float, ...] = ()
        if job.weigh:
            _check(result.logprobs.token_ids[1:], job.weigh)  # the first is the token that was generated
            weighed = tuple(result.logprobs.logprobs[1:])
        return Done(number, tuple(result.token_ids), weighed, read, out.num_cached_tokens or 0)


def _check(found: list[int], asked: tuple[int, ...]) -> None:
    if tuple(found) != asked:
        raise RuntimeError("vLLM gave log-probabilities of other tokens than those asked for")
