"""The estimate of a plan: memory, time, whether it fits, and what to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from spalign.training.estimate.cost import flops_of, traffic_of
from spalign.training.estimate.memory import Memory, memory_of
from spalign.training.estimate.plan import Plan

RESERVE = 0.05
"""Assumed share of the device's memory for the CUDA context, NCCL and fragmentation: a run fits in the other 95%."""
NODE = 8
"""Devices that share a fast link."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan needs. seconds are of one optimiser step; flops of one step on all devices together."""

    plan: Plan
    memory: Memory
    fits: bool | None
    """None: the device's memory is not known."""
    steps: int
    tokens_per_step: int
    flops: float
    compute_seconds: float
    communication_seconds: float
    advice: tuple[str, ...] = ()
    """What to change if it does not fit, each with what it brings."""

    @property
    def seconds(self) -> float:
        """The longer of computation and communication: they are assumed to overlap wholly."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def hours(self) -> float:
        return self.steps * self.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plan = self.plan
        return {
            "plan": {**asdict(plan), "prompts_per_step": plan.step_prompts, "efficiency": plan.reached},
            "parameters": plan.model.parameters,
            "trainable": plan.trainable,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops,
            "compute_seconds": self.compute_seconds,
            "communication_seconds": self.communication_seconds,
            "seconds_per_step": self.seconds,
            "hours": self.hours,
            "tokens": round(plan.prompts * plan.epochs * plan.tokens),
            "pairwise_tokens": round(plan.prompts * plan.epochs * plan.pairwise_tokens),
            "advice": list(self.advice),
        }


def estimate(plan: Plan) -> Estimate:
    """Memory, time and, where it does not fit, what to change.

    Computation: FLOPs of a step / (devices x peak x efficiency). Communication: `traffic_of` / B/s of the slowest link on the way.
    """
    memory = memory_of(plan)
    fits = _fits(plan, memory)
    flops = plan.step_prompts * flops_of(plan)
    rate = plan.device.link if plan.devices <= NODE and plan.device.link else plan.network
    return Estimate(
        plan,
        memory,
        fits,
        steps=max(1, math.ceil(plan.prompts * plan.epochs / plan.step_prompts)),
        tokens_per_step=plan.step_prompts * plan.tokens,
        flops=flops,
        compute_seconds=flops / (plan.devices * plan.device.flops * plan.reached),
        communication_seconds=traffic_of(plan) / rate,
        advice=() if fits is not False else tuple(_advice(plan)),
    )


def _fits(plan: Plan, memory: Memory) -> bool | None:
    return None if plan.device.memory is None else memory.total <= (1 - RESERVE) * plan.device.memory


def _advice(plan: Plan) -> Iterator[str]:
    """One change on top of the other, each with the memory it leads to, until it fits."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--gradient-checkpointing", {"checkpointing": True}),
        ("--prompts-per-forward 1", {"prompts_per_forward": 1, "prompts_per_step": plan.step_prompts}),
    ]
    several = plan.devices > 1
    if several and plan.sharding == "ddp" and plan.method != "qlora":  # four bits are not spread over devices
        changes.append(("--sharding fsdp2", {"sharding": "fsdp2"}))
    if plan.method in ("full", "dora"):
        changes.append(("--method lora", {"method": "lora"}))
    changes.append(("--method qlora" + " --sharding ddp" * several, {"method": "qlora", "sharding": "ddp"}))
    now = plan
    for flag, change in changes:
        then = replace(now, **change)
        memory = memory_of(then)
        if memory.total >= memory_of(now).total:
            continue
        now, fits = then, _fits(then, memory)
        yield f"{flag}: {memory.total / 1e9:.1f} GB, {'fits' if fits else 'still too much'}"
        if fits:
            return
    four_bits = plan.method == "qlora"
    method = "lora" if four_bits else plan.method
    most = replace(plan, method=method, checkpointing=True, prompts_per_forward=1, prompts_per_step=None, sharding="fsdp2")
    for devices in (2**i for i in range(1, 13)):
        if devices > plan.devices and _fits(more := replace(most, devices=devices), memory_of(more)):
            yield f"or more devices: {'--method lora ' * four_bits}--devices {devices} --sharding fsdp2 --gradient-checkpointing"
            return
    yield "shorter responses or fewer of them: one prompt's activations alone are too much"


def print_estimate(found: Estimate, console: Any) -> None:
    """The estimate as a table for a person."""
    from rich.table import Table
    from rich.text import Text

    plan = found.plan
    table = Table(title="Memory of each device", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, size in asdict(found.memory).items():
        table.add_row(f"  {name}", f"{size / 1e9:,.1f} GB")
    table.add_row("total", f"{found.memory.total / 1e9:,.1f} GB", style="bold")
    if plan.device.memory is not None:
        table.add_row("device", f"{plan.device.memory / 1e9:,.1f} GB, of which {(1 - RESERVE):.0%} can be used")
    console.print(table)
    if found.fits is not None:
        console.print(Text("fits" if found.fits else "does not fit", style="bold green" if found.fits else "bold red"))
    for line in found.advice:
        console.print(Text(f"  {line}"))
    table = Table(title="Time", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    said = "assumed: an H200's share" if plan.efficiency is None else "as given"
    table.add_row("prompts a step", f"{plan.step_prompts:,} ({found.tokens_per_step:,} tokens, {found.flops:.2e} FLOPs)")
    table.add_row("computation", f"{found.compute_seconds:,.2f} s a step, at {plan.reached:.0%} of the peak ({said})")
    table.add_row("communication", f"{found.communication_seconds:,.2f} s a step, assumed to hide behind it")
    table.add_row("whole run", f"{found.hours:,.2f} h for {found.steps:,} steps", style="bold")
    share = plan.pairwise_tokens / plan.tokens
    table.add_row("pair by pair", f"would run {share:.1f} times the tokens ({plan.pairwise_tokens:,} a prompt instead of {plan.tokens:,})")
    console.print(table)
