"""A training run to be estimated: a model's shape, a device, and the options that memory and time depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from spalign.errors import SpalignError
from spalign.training.estimate.shape import Shape, shape_of

Method = Literal["full", "lora", "dora", "qlora"]
Sharding = Literal["ddp", "fsdp2", "zero3"]
METHODS: tuple[Method, ...] = ("full", "lora", "dora", "qlora")
SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2", "zero3")

EFFICIENCY = {"full": 0.49, "adapter": 0.33}
"""Share of the data sheet's peak that a step reaches. From one H200: 8B, two prompts of 5 x 512 tokens in a forward pass, the full weights
in bf16 without autocast, and LoRA. Assumed for all other devices, sizes and methods."""
NETWORK = 50e9
"""Assumed B/s in one direction between nodes, a device (400 Gbit/s); counts from the ninth device on."""


@dataclass(frozen=True, slots=True)
class Device:
    """memory: B. flops: dense bf16 FLOP/s. link: B/s in one direction to the other devices of its node. None: not known."""

    name: str
    memory: float | None
    flops: float
    link: float | None


# makers' data sheets: NVLink's 900 (600) GB/s count both directions
DEVICES = {
    "h200": Device("h200", 141e9, 989e12, 450e9),
    "h100": Device("h100", 80e9, 989e12, 450e9),
    "a100": Device("a100", 80e9, 312e12, 300e9),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A training run. Raises SpalignError for numbers that make none.

    prompts_per_step: over all devices; none: the fewest that are at least 8 and one forward pass on each device.
    efficiency: share of the device's peak that is reached; none: what was measured.
    """

    model: Shape
    device: Device
    method: Method = "full"
    rank: int = 16
    devices: int = 1
    sharding: Sharding = "ddp"
    prompts: int = 10_000
    responses: int = 5
    prompt_tokens: int = 128
    response_tokens: int = 512
    prompts_per_forward: int = 1
    prompts_per_step: int | None = None
    checkpointing: bool = False
    epochs: float = 1.0
    efficiency: float | None = None
    network: float = NETWORK

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("sharding", SHARDINGS)):
            if getattr(self, name) not in known:
                raise SpalignError(f"no {name} '{getattr(self, name)}'", hint=f"one of {', '.join(known)}")
        if self.method == "qlora" and self.sharded:
            raise SpalignError(
                f"sharding {self.sharding}: a base in four bits is not spread over devices", hint="take ddp (DDP), or the method lora"
            )
        whole = ("rank", "devices", "prompts", "prompt_tokens", "response_tokens", "prompts_per_forward")
        for name in whole:
            if getattr(self, name) < 1:
                raise SpalignError(f"{name} is {getattr(self, name)}", hint="give a whole number from 1 on")
        if self.responses < 2:
            raise SpalignError(f"responses is {self.responses}", hint="a preference pair needs two")
        if not 0 < self.reached <= 1:
            raise SpalignError(f"efficiency is {self.efficiency}", hint="give a share of the peak, above 0 and up to 1")
        for name, value in (("epochs", self.epochs), ("network", self.network), ("the device's FLOP/s", self.device.flops)):
            if not (math.isfinite(value) and value > 0):
                raise SpalignError(f"{name} is {value}", hint="give a number above 0")
        at_once = self.devices * self.prompts_per_forward
        if self.prompts_per_step is not None and (self.prompts_per_step < 1 or self.prompts_per_step % at_once):
            raise SpalignError(
                f"prompts_per_step {self.prompts_per_step} is not a multiple of {at_once}",
                hint=f"{self.devices} devices with {self.prompts_per_forward} prompts a forward pass run {at_once} prompts at once",
            )

    @property
    def forwards(self) -> int:
        """Forward passes of each device in an optimiser step."""
        at_once = self.devices * self.prompts_per_forward
        return math.ceil(8 / at_once) if self.prompts_per_step is None else self.prompts_per_step // at_once

    @property
    def step_prompts(self) -> int:
        return self.forwards * self.devices * self.prompts_per_forward

    @property
    def tokens(self) -> int:
        """T = P + K R: tokens of a prompt with its responses, each once."""
        return self.prompt_tokens + self.responses * self.response_tokens

    @property
    def pairwise_tokens(self) -> int:
        """Tokens of a prompt trained pair by pair: K (K - 1) / 2 pairs of two sequences of P + R tokens."""
        return self.responses * (self.responses - 1) * (self.prompt_tokens + self.response_tokens)

    @property
    def adapted(self) -> bool:
        return self.method != "full"

    @property
    def reached(self) -> float:
        """The share of the device's peak."""
        return EFFICIENCY["adapter" if self.adapted else "full"] if self.efficiency is None else self.efficiency

    @property
    def adapter(self) -> int:
        return self.model.adapter(self.rank, magnitudes=self.method == "dora") if self.adapted else 0

    @property
    def trainable(self) -> int:
        return self.adapter if self.adapted else self.model.parameters

    @property
    def sharded(self) -> bool:
        return self.sharding != "ddp" and self.devices > 1


def plan_from(model: str, device: str, *, gflops: float | None = None, memory_gb: float | None = None, **options: Any) -> Plan:
    """A plan from names, as the command line gives them. Raises SpalignError."""
    if device in DEVICES:
        chosen = DEVICES[device]
        chosen = replace(chosen, flops=chosen.flops if gflops is None else gflops * 1e9)
    elif device == "cpu":
        if gflops is None:
            raise SpalignError(
                "a cpu's speed is not known", hint="measure a large matrix product and give --gflops (benchmarks/estimate.py)"
            )
        chosen = Device("cpu", None, gflops * 1e9, None)
    else:
        raise SpalignError(f"no device '{device}'", hint=f"one of {', '.join(DEVICES)}, cpu")
    if memory_gb is not None:
        if not (math.isfinite(memory_gb) and memory_gb > 0):
            raise SpalignError(f"memory is {memory_gb} GB", hint="give a number above 0")
        chosen = replace(chosen, memory=memory_gb * 1e9)
    return Plan(shape_of(model), chosen, **options)
