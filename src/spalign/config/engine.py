"""How a model is run: here, by workers of a cluster, or by a server."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from spalign.config.base import Part, PositiveInt

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks of an adapter that vLLM can be told."""
_ALIKE = {"dtype", "device", "trust_remote_code"}
"""What an engine's answers depend on, beside its kind."""

_HERE = {*_ALIKE, "batch_size", "batching", "memory", "hidden_states"}
"""What says how a model is run by this process or a worker of it."""

_OF_RAY = ("worker", "workers", "worker_cpus", "worker_gpus", "address")


def checked_address(value: str | None) -> str | None:
    """A server's address. Raises ValueError where it is none, or holds what might be a secret."""
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ValueError("expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address without user, password, query or fragment; a key belongs into an environment variable")
    return value.rstrip("/")


class EngineConfig(Part):
    """How a model is run: here, or by a server that speaks the OpenAI protocol (docs/engines.md)."""

    kind: Literal["transformers", "vllm", "openai", "ray"] = "transformers"
    """transformers: any model, any score. vllm: faster, in a process of its own; no hidden states. openai: a model that a server runs.
    ray: several of the first two side by side, on the nodes of a cluster."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on CUDA and on CPUs with bf16 instructions, else float32."""
    device: str = "auto"
    batch_size: PositiveInt = 128
    """Sequences that run through the model together."""
    batching: Literal["auto", "static", "continuous"] = "auto"
    """transformers: static: batches by length, each of which runs to its end, the same ones in a resumed run; continuous: transformers'
    continuous batching, which is made for GPUs. auto: continuous on a GPU that has a flash kernel for the model, else static."""
    memory: Annotated[float, Field(gt=0)] | None = None
    """vLLM: share of the GPU's memory that it may take (default 0.9); on a CPU, GiB for keys and values (default 4).
    transformers with continuous batching: share of a GPU's free memory for keys and values."""
    hidden_states: bool = False
    """vLLM: give hidden states too, which the scorer probe needs: the same model runs in transformers beside it, so its weights are there
    twice."""
    trust_remote_code: bool = False
    base_url: str | None = None
    """openai: where the server is, usually ending in /v1. The model's name there is the run's `model`, or the judge's name."""
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    """openai: the environment variable that holds the key; the key itself stands nowhere. Without one none is sent."""
    tokenizer: str | None = None
    """openai: local folder or hub id of the model that is served: its tokenizer, and what is trained; default: `model`, where it is one."""
    concurrency: PositiveInt = 32
    """openai: requests under way at a time."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """openai: seconds without a byte from the server after which a request is tried again."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """openai: how often a request is tried again after 429, 408, 409, 5xx, a lost connection, or a reply that is none."""

    worker: Literal["transformers", "vllm"] = "transformers"
    """ray: how each worker runs the model."""
    workers: PositiveInt | None = None
    """ray: how many; default: one a GPU of the cluster, without GPUs one a node."""
    worker_cpus: Annotated[float, Field(gt=0)] | None = None
    """ray: CPUs that a worker takes; default: 1 beside a GPU, else its share of the cluster's."""
    worker_gpus: Annotated[float, Field(ge=0)] | None = None
    """ray: GPUs that a worker takes, or which share of one; default: 1, without GPUs 0."""
    address: str | None = None
    """ray: of the cluster; default: RAY_ADDRESS, else a new one of this machine alone."""

    @property
    def served(self) -> bool:
        """Whether the model runs on a server, of which only the name is known here."""
        return self.kind == "openai"

    @property
    def by(self) -> str:
        """What runs the model, here or in a worker."""
        return self.worker if self.kind == "ray" else self.kind

    def matters(self) -> dict[str, Any]:
        """What results depend on, for a stage's digest: not how many at a time, nor where a server is and how patiently it is asked."""
        batching = {"batching": self.batching} if self.batching == "continuous" else {}
        device = {"device": self.device.partition(":")[0]}  # which of several like GPUs does not matter
        return {**self.model_dump(include=_ALIKE), **device, **batching, "kind": self.by}

    def here(self) -> EngineConfig:
        """How a model that the run itself made is run: no server has it."""
        return EngineConfig(kind="transformers", **self.model_dump(include=_HERE)) if self.served else self

    def in_worker(self) -> EngineConfig:
        """How a worker of kind ray runs the model."""
        return EngineConfig(kind=self.worker, **self.model_dump(include=_HERE))

    @field_validator("base_url")
    @classmethod
    def _no_secret_in_the_address(cls, value: str | None) -> str | None:
        return checked_address(value)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.served and self.base_url is None:
            raise ValueError("kind openai needs base_url, for example http://localhost:8000/v1")
        if not self.served and (self.base_url or self.tokenizer):
            raise ValueError(f"base_url and tokenizer are for a served model, and the kind is {self.kind}; set kind: openai")
        given = [f for f in _OF_RAY if getattr(self, f) != type(self).model_fields[f].default]
        if self.kind != "ray" and given:
            raise ValueError(f"{', '.join(given)}: for kind ray, and the kind is {self.kind}; set kind: ray")
        if self.batching == "continuous" and self.by != "transformers":
            raise ValueError("batching: continuous is an option of kind transformers; vllm and servers batch so by themselves")
        if self.hidden_states and self.by != "vllm":
            raise ValueError("hidden_states is an option of kind vllm; transformers has them, servers show none")
        return self
