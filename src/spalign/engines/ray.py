"""The Ray engine: several engines, each in a process of its own somewhere in a cluster. A call goes to one of them as a whole.

So a worker's answer is what its engine would give here, to the bit: it does not matter how many workers there are, nor which of them did
it, nor how often one was lost. Parts of a stage are done side by side, one a worker (`spalign.store.run_in_parts`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from spalign.config import EngineConfig
from spalign.engines import ray_pool
from spalign.engines.base import Ask, Capability, Completion, GenerateRequest, only
from spalign.engines.loading import load_tokens
from spalign.engines.ray_pool import Pool
from spalign.engines.ray_worker import in_words
from spalign.engines.tokens import ChatTokens, TokenEngine
from spalign.errors import EngineError
from spalign.text import printable, shorten


class RayEngine(TokenEngine):
    """`width` workers of a `Pool`; more than the cluster has room for by now join when it has."""

    name = "ray"
    batching = False

    def __init__(self, config: EngineConfig, tokens: ChatTokens, pool: Pool, needs: dict[str, float], window: int) -> None:
        """needs: what each worker takes of the cluster. window: its engine's, in tokens."""
        self.capabilities = _capabilities(config)
        self.tokens, self.width, self._pool, self._needs, self._window = tokens, pool.width, pool, needs, window
        _open.add(self)

    def close(self) -> None:
        """End the workers and give their memory back; calls under way fail."""
        self._pool.close()
        _open.discard(self)

    @property
    def window(self) -> int:
        return self._window

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        missing = {(r.id, i) for r in requests for i in range(len(r.seeds))}
        for _ in range(ray_pool.TRIES):
            # what a batch gave depends on what ran beside it: there it runs again as it was
            for completion in self._stream(requests) if self.batching else only(self._stream, requests, missing):
                key = (completion.request_id, completion.index)
                if key in missing:
                    missing.remove(key)
                    yield completion
            if not missing:
                return
        raise EngineError(f"{len(missing)} completions did not come back from the Ray workers", hint="the same command goes on")

    def _stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        """A worker's `generate`. After one that was lost, another order of completions may leave some out and bring others twice."""
        return self._pool.ask("generate", requests)

    def choice_logprobs(self, asks: Sequence[Ask], choices: Sequence[str]) -> list[tuple[float, ...] | None]:
        return self._score("choice_logprobs", asks, choices)

    def loglikelihood(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, ...] | None]:
        return self._score("loglikelihood", requests)

    def representations(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], depths: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        return self._score("representations", requests, depths)

    def _score(self, verb: str, *arguments: Any) -> list[tuple[float, ...] | None]:
        return list(next(self._pool.ask("score", verb, *arguments)))


class BatchingRayEngine(RayEngine):
    """Its workers' completions depend on what runs beside them (`Batching`)."""

    batching = True

    def batches(self, requests: Sequence[GenerateRequest]) -> list[list[tuple[GenerateRequest, int]]]:
        places = next(self._pool.ask("batches", requests))
        return [[(requests[n], i) for n, i in batch] for batch in places]


_open: set[RayEngine] = set()
"""Engines of this process that have workers: a judge of its own has them beside the policy's."""


def _ray() -> Any:
    """The library, whose own types are partial."""
    import ray

    return ray


def load_ray(name: str, config: EngineConfig) -> RayEngine:
    """The engine whose workers are `config.worker`.

    Raises ModelError or EngineError with what to do: no such model, no cluster there, no room for a worker in it.
    """
    if importlib.util.find_spec("ray") is None:
        raise EngineError(
            "engine.kind is ray, and the package ray is not installed", hint="pip install 'spalign[ray]', or engine.kind=transformers"
        )
    tokens, _ = load_tokens(name, config)
    own = _connect(config)
    width, needs = _layout(config, own=own)
    if config.batching == "auto" and needs["num_gpus"] < 1:  # two on a GPU would take each other's memory for their pages
        config = config.model_copy(update={"batching": "static"})
    pool = Pool(name, config.in_worker(), width, needs)
    try:
        window, static = next(pool.ask("about", times=width))
    except BaseException:
        pool.close()
        raise
    return (BatchingRayEngine if static else RayEngine)(config, tokens, pool, needs, window)


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
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters of it is raised as an exception as well
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")  # a call takes 0.1 s to go and come back, with it 0.3 s
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        try:
            ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as e:  # OSError and others: its folder cannot be made, or its sockets' paths would be too long
            raise EngineError(
                f"no Ray cluster can be started here: {in_words(e, 200)}", hint="set RAY_TMPDIR to a short path that can be written"
            ) from e
        _started_here.set()
        return True
    if address.startswith("ray://"):
        raise EngineError(
            f"engine.address or RAY_ADDRESS '{shorten(printable(address), 100)}' is for Ray's client, which hands nothing on one by one",
            hint="run the command on a node of the cluster, with the address of its head, for example head:6379, or auto",
        )
    try:
        if host_port := re.fullmatch(r"(\[?[^/]*?\]?):(\d+)", address):  # ray tries for a minute, and then ends the process
            socket.create_connection((host_port[1].strip("[]"), int(host_port[2])), timeout=10).close()
        ray.init(address=address, **quiet)
    except Exception as e:  # ConnectionError, and others for an address that is none
        raise EngineError(
            f"no Ray cluster at '{shorten(printable(address), 100)}': {in_words(e, 200)}",
            hint="start one there (ray start --head), or mend engine.address or RAY_ADDRESS; without them one is started here",
        ) from e
    return False


_started_here = threading.Event()


def _layout(config: EngineConfig, *, own: bool) -> tuple[int, dict[str, float]]:
    """How many workers, and what each of them takes of the cluster; by default one a GPU, without GPUs one a node."""
    ray = _ray()
    there = dict(ray.cluster_resources())
    for engine in _open:
        for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            there[kind] = there.get(kind, 0) - engine.width * engine._needs[name]
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0 and config.device != "cpu"
    gpus = config.worker_gpus if config.worker_gpus is not None else float(on_gpu)
    nodes = max(1, sum(n["Alive"] for n in ray.nodes()))
    cpus = config.worker_cpus
    count = config.workers or (max(1, int(there["GPU"] // gpus)) if gpus and on_gpu else nodes)
    if cpus is None:
        cpus = 1.0 if gpus else max(1.0, math.floor(there.get("CPU", 1) / max(count, nodes)))
    needs = {"num_cpus": cpus, "num_gpus": gpus}
    if own and (lack := _lack(there, count, needs)):  # it will not grow
        beside = " beside the policy's workers" if _open else ""
        raise EngineError(
            f"{lack}{beside}",
            hint="lower engine.workers, or what a worker takes (worker_cpus, worker_gpus); or name a larger cluster: engine.address",
        )
    return count, needs


def _lack(there: dict[str, float], count: int, needs: dict[str, float]) -> str:
    """What the cluster lacks for so many workers, in words; empty: nothing."""
    for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if count * needs[name] > there.get(kind, 0):
            free = there.get(kind, 0)
            return f"{count} workers of {needs[name]:g} {kind}s each do not fit into the {free:g} {kind}s that the Ray cluster has free"
    return ""
