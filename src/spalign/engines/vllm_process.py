"""The process in which vLLM runs. It ends when its parent does, however that ends, and takes everything that it started with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from spalign.startup import slim


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


class Call(NamedTuple):
    """Jobs that are wanted together. Several calls are under way at the same time; what was asked for first runs first."""

    number: int
    jobs: list[Job]


class Stop(NamedTuple):
    """Nobody waits for this call any more."""

    number: int


class Some(NamedTuple):
    """What is done of a call. over: it is the last of it; a call has one such."""

    number: int
    done: list[Done]
    over: bool


def main(fd: int, folder: str) -> None:
    """Load the model that the first message describes, then do every call that comes. folder: for what it writes; goes when it ends."""
    slim()
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    connection = Connection(fd)
    try:
        serve = Server(connection.recv())
        connection.send(Ready(serve.window))
        inbox: SimpleQueue[Call | Stop | None] = SimpleQueue()
        threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
        serve.until_none(inbox, connection.send)
    except EOFError:
        pass
    except BaseException as e:
        with contextlib.suppress(OSError):
            connection.send(Failed(f"{type(e).__name__}: {e}"))
        raise


def _listen(connection: Connection, inbox: SimpleQueue[Call | Stop | None]) -> None:
    """In a thread of its own, so that who sends never waits for who computes. None: nobody sends any more."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        pass
    finally:
        inbox.put(None)


def _end_with_parent(folder: str) -> None:
    """Standard input is held open by the parent and never written to. Who has killed the parent has left the folder to us."""
    sys.stdin.buffer.read()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


@dataclass(slots=True)
class _Waiting:
    """A call under way. left: numbers of its jobs that are not done."""

    jobs: list[Job]
    left: set[int]


class Server:
    """settings: arguments of vllm.LLM; `adapter`, where there is one, is the folder of a LoRA adapter that all jobs run with."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        adapter = settings.pop("adapter", None)
        self._lora = LoRARequest("policy", 1, adapter) if adapter else None
        self._engine = LLM(**settings).llm_engine
        self._calls: dict[int, _Waiting] = {}

    @property
    def window(self) -> int:
        return int(self._engine.model_config.max_model_len)

    def until_none(self, inbox: SimpleQueue[Call | Stop | None], send: Callable[[Some], None]) -> None:
        """Do what comes, step by step; `send` results whenever there are some."""
        while True:
            while not (inbox.empty() and self._engine.has_unfinished_requests()):
                if (message := inbox.get()) is None:
                    return
                self._begin(message)
            self._step(send)

    def _begin(self, message: Call | Stop) -> None:
        if isinstance(message, Call):
            self._calls[message.number] = _Waiting(message.jobs, set(range(len(message.jobs))))
            for n in range(len(message.jobs)):
                self._add(message.number, n)
        elif waiting := self._calls.pop(message.number, None):  # else it was over before the message came
            self._engine.abort_request([f"{message.number}-{n}" for n in waiting.left])

    def _step(self, send: Callable[[Some], None]) -> None:
        found: dict[int, list[Done]] = {}
        for out in self._engine.step():
            call, n = map(int, out.request_id.split("-"))
            if out.finished and call in self._calls and (done := self._done(call, n, out)) is not None:
                self._calls[call].left.remove(n)
                found.setdefault(call, []).append(done)
        for call, some in found.items():
            if over := not self._calls[call].left:
                del self._calls[call]
            send(Some(call, some, over))

    def _add(self, call: int, number: int, *, anew: bool = False) -> None:
        """anew: without what is remembered of earlier prompts."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from spalign.engines.vllm_sampler import ARGUMENT

        job = self._calls[call].jobs[number]
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
        self._engine.add_request(f"{call}-{number}", {"prompt_token_ids": list(job.ids)}, params, lora_request=self._lora)

    def _done(self, call: int, number: int, out: Any) -> Done | None:
        """None where the job has to run again: of tokens that were remembered vLLM knows no log-probabilities."""
        job = self._calls[call].jobs[number]
        read: tuple[float, ...] = ()
        if job.read_from is not None:
            if (out.num_cached_tokens or 0) > job.read_from - 1:
                self._add(call, number, anew=True)
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
