"""The Ray engine: several engines, each in a process of its own somewhere in a cluster. A call goes to one of them as a whole.

So a worker's answer is what its engine would give here, to the bit: it does not matter how many workers there are, nor which of them did
it, nor how often one was lost. Parts of a stage are done side by side, one a worker (`spalign.store.run_in_parts`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from spalign.config import EngineConfig
from spalign.engines.base import Ask, Capability, Completion, Engine, GenerateRequest, only
from spalign.engines.loading import load_tokens
from spalign.engines.tokens import TokenEngine
from spalign.errors import EngineError, SpalignError
from spalign.text import printable, shorten

T = TypeVar("T")
_TRIES = 3
"""How many workers a call may lose before it is taken to be its fault."""
_PATIENCE = 600.0
"""Seconds in which a cluster that lacks room for a worker may make some, as those that grow by themselves do."""


class Worker:
    """What runs in the cluster: an engine, loaded at the first call, also after the process was lost and started again."""

    def __init__(self, name: str, config: EngineConfig) -> None:
        self._name, self._config = name, config
        self._engine: Engine | None = None

    def up(self) -> None:
        """Answered when the process is there; nothing is loaded."""

    def _ready(self) -> Engine:
        from spalign.engines.make import load_engine

        if self._engine is None:
            self._engine = load_engine(self._name, self._config)
        return self._engine

    def window(self) -> int:
        return self._ready().window

    def call(self, verb: str, *arguments: Any) -> Any:
        return getattr(self._ready(), verb)(*arguments)

    def batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[int, int]]]:
        """As `Batching.batches`, with places among the requests in place of requests."""
        place = {r.id: n for n, r in enumerate(requests)}
        engine: Any = self._ready()
        return [[(place[r.id], i) for r, i in batch] for batch in engine.batches(requests)]

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        yield from self._ready().generate(requests)


class RayEngine(TokenEngine):
    """Workers that are lost are started again, elsewhere where need be, and what they had in hand is done by the next free one.

    lost: how often that happened.
    """

    name = "ray"

    def __init__(self, name: str, config: EngineConfig) -> None:
        """Raises ModelError or EngineError with what to do: no such model, no cluster there, no room for the workers in it."""
        ray = self._ray = _ray()
        self.capabilities = _capabilities(config)
        self.tokens, _ = load_tokens(name, config)
        own = _connect(config)
        self.width, needs = _layout(config, own=own)
        there = config.in_worker()
        make = ray.remote(Worker).options(max_restarts=-1, max_task_retries=0, **needs)
        self._workers: list[Any] = [make.remote(name, there) for _ in range(self.width)]
        self._idle: queue.SimpleQueue[Any | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self.lost = 0
        try:
            self._window = min(self._start(needs))
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._idle.put(worker)

    def _start(self, needs: dict[str, float]) -> list[int]:
        """The workers' windows, when all have loaded their model."""
        ray = self._ray
        up, deadline = [w.up.remote() for w in self._workers], time.monotonic() + _PATIENCE
        while up:  # all have a process of their own: what the cluster has to give
            done, up = ray.wait(up, num_returns=len(up), timeout=1.0)
            for ref in done:
                with self._told():
                    ray.get(ref)
            if up and time.monotonic() > deadline:
                there = _lack(ray.cluster_resources(), self.width, needs) or "others may use the cluster"
                raise EngineError(
                    f"only {self.width - len(up)} of {self.width} workers started within {_PATIENCE:g} s: {there}",
                    hint="lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or add nodes",
                )
        with self._told():
            return list(ray.get([w.window.remote() for w in self._workers]))

    def close(self) -> None:
        """End the workers and give their memory back; calls under way fail."""
        self._closed.set()
        for worker in self._workers:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.kill(worker, no_restart=True)
        for _ in self._workers:
            self._idle.put(None)  # whoever waits for a worker

    @property
    def window(self) -> int:
        return self._window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        missing = {(r.id, i) for r in requests for i in range(len(r.seeds))}
        for attempt in range(1, _TRIES + 1):
            with self._worker(last=attempt == _TRIES) as worker:
                # what a batch gave depends on what ran beside it: there it runs again as it was
                remote = partial(self._stream, worker)
                for completion in remote(requests) if self.batching else only(remote, requests, missing):
                    key = (completion.request_id, completion.index)
                    if key in missing:
                        missing.remove(key)
                        yield completion
                return

    batching = False

    def _stream(self, worker: Any, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        """The worker's `generate`, completion by completion."""
        for ref in worker.generate.options(num_returns="streaming").remote(requests):
            yield self._ray.get(ref)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        return self._call("choice_logprobs", asks, choices)

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        return self._call("loglikelihood", requests)

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        return self._call("representations", requests, depths)

    def _call(self, verb: str, *arguments: Any) -> list[tuple[float, ...] | None]:
        def ask(worker: Any) -> list[tuple[float, ...] | None]:
            found: list[tuple[float, ...] | None] = self._ray.get(worker.call.remote(verb, *arguments))
            return found

        return self._retried(ask)

    def _retried(self, do: Callable[[Any], T]) -> T:
        for attempt in range(1, _TRIES + 1):
            with self._worker(last=attempt == _TRIES) as worker:
                return do(worker)
        raise AssertionError  # the last one raises

    @contextlib.contextmanager
    def _worker(self, *, last: bool) -> Iterator[Any]:
        """A free worker, given back afterwards. Where it is lost within, that is told only the last time."""
        worker = None if self._closed.is_set() else self._idle.get()
        if worker is None:
            raise EngineError("the Ray engine was closed", hint="make a new one")
        lost = False
        try:
            with self._told():
                yield worker
        except _Lost as e:
            lost = True
            self.lost += 1
            if self._closed.is_set():
                raise EngineError("the Ray engine was closed", hint="make a new one") from None
            if last:
                raise EngineError(
                    f"{_TRIES} workers were lost on the same call: {shorten(printable(' '.join(str(e).split())), 300)}",
                    hint="short of memory? lower engine.batch_size or give a worker more; ray's own logs of the workers say more",
                ) from e
        finally:
            if lost:
                threading.Thread(target=self._revive, args=(worker,), daemon=True).start()
            else:
                self._idle.put(worker)

    def _revive(self, worker: Any) -> None:
        """Give it back when it is there again, or when it cannot be had: what is wrong with it then, the next call says."""
        ray = self._ray
        for _ in range(_TRIES):
            deadline = time.monotonic() + _PATIENCE
            with contextlib.suppress(Exception):  # a time-out among them
                while not self._closed.is_set() and (left := deadline - time.monotonic()) > 0:
                    try:
                        ray.get(worker.up.remote(), timeout=left)
                        break
                    except ray.exceptions.ActorUnavailableError:  # on its way
                        time.sleep(0.2)
            try:
                ray.get(worker.window.remote())
                break
            except ray.exceptions.ActorUnavailableError:  # it was lost again while it loaded its model
                continue
            except Exception:
                break
        if not self._closed.is_set():
            self._idle.put(worker)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Ray's errors as ours; _Lost where the worker is gone."""
        errors = self._ray.exceptions
        try:
            yield
        except (
            errors.RayActorError,
            errors.NodeDiedError,
            errors.ObjectLostError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,
        ) as e:
            raise _Lost(str(e)) from e
        except errors.RayTaskError as e:
            if isinstance(e.cause, SpalignError):
                raise e.cause from None
            raise EngineError(
                f"a worker failed: {type(e.cause).__name__}: {shorten(printable(' '.join(str(e.cause).split())), 500)}",
                hint="ray's own logs of the workers say more; engine.kind=transformers or vllm runs the same here",
            ) from e
        except errors.RayError as e:
            raise EngineError(f"Ray failed: {shorten(printable(' '.join(str(e).split())), 300)}", hint="is the cluster still there?") from e


class BatchingRayEngine(RayEngine):
    """Its workers' completions depend on what runs beside them (`Batching`)."""

    batching = True

    def batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[GenerateRequest, int]]]:
        places = self._retried(lambda worker: self._ray.get(worker.batches.remote(requests)))
        return [[(requests[n], i) for n, i in batch] for batch in places]


class _Lost(Exception):
    """The worker is gone, and the call with it."""


def _ray() -> Any:
    """The library, whose own types are partial."""
    import ray

    return ray


def load_ray(name: str, config: EngineConfig) -> RayEngine:
    """The engine whose workers are `config.worker`. Raises ModelError or EngineError with what to do."""
    if importlib.util.find_spec("ray") is None:
        raise EngineError(
            "engine.kind is ray, and the package ray is not installed", hint="pip install 'spalign[ray]', or engine.kind=transformers"
        )
    static = config.worker == "transformers" and config.batching == "static"
    return (BatchingRayEngine if static else RayEngine)(name, config)


def _capabilities(config: EngineConfig) -> frozenset[Capability]:
    if config.worker == "vllm":
        from spalign.engines.vllm import VLLMEngine

        return VLLMEngine.capabilities_of(config)
    from spalign.engines.transformers import TransformersEngine

    return TransformersEngine.capabilities


def _connect(config: EngineConfig) -> bool:
    """Join the cluster that the configuration or RAY_ADDRESS names; without a name, start one of this machine alone, and return True.

    Never another that runs here: its owner counts on its room, and may be gone in a minute.
    """
    ray = _ray()
    if ray.is_initialized():
        return _started_here.is_set()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        ray.init(address="local", include_dashboard=False, **quiet)
        _started_here.set()
        return True
    try:
        if host_port := re.fullmatch(r"(?:ray://)?(\[?[^/]*?\]?):(\d+)", address):  # ray tries for a minute, and then ends the process
            socket.create_connection((host_port[1].strip("[]"), int(host_port[2])), timeout=10).close()
        ray.init(address=address, **quiet)
    except Exception as e:  # ConnectionError, and others for an address that is none
        raise EngineError(
            f"no Ray cluster at '{shorten(printable(address), 100)}': {shorten(printable(' '.join(str(e).split())), 200)}",
            hint="start one there (ray start --head), or mend engine.address or RAY_ADDRESS; without them one is started here",
        ) from e
    return False


_started_here = threading.Event()


def _layout(config: EngineConfig, *, own: bool) -> tuple[int, dict[str, float]]:
    """How many workers, and what each of them takes of the cluster; by default one a GPU, without GPUs one a node."""
    ray = _ray()
    there = ray.cluster_resources()
    on_gpu = there.get("GPU", 0) > 0 and config.device != "cpu"
    gpus = config.worker_gpus if config.worker_gpus is not None else float(on_gpu)
    nodes = max(1, sum(n["Alive"] for n in ray.nodes()))
    cpus = config.worker_cpus
    count = config.workers or (max(1, int(there["GPU"] // gpus)) if gpus and on_gpu else nodes)
    if cpus is None:
        cpus = 1.0 if gpus else max(1.0, math.floor(there.get("CPU", 1) / max(count, nodes)))
    needs = {"num_cpus": cpus, "num_gpus": gpus}
    if own and (lack := _lack(there, count, needs)):  # it will not grow
        raise EngineError(
            lack, hint="lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or name a cluster: engine.address"
        )
    return count, needs


def _lack(there: dict[str, float], count: int, needs: dict[str, float]) -> str:
    """What the cluster lacks for so many workers, in words; empty: nothing."""
    for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if count * needs[name] > there.get(kind, 0):
            return f"{count} workers of {needs[name]:g} {kind}s each do not fit into a Ray cluster of {there.get(kind, 0):g} {kind}s"
    return ""
