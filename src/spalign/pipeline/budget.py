"""What a run takes at most, counted from its configuration and prompts before anything runs: tokens, scores, memory, hours, money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import PromptsConfig, PromptSource, RunConfig
from spalign.errors import ModelError, SpalignError
from spalign.prompts import load_prompts
from spalign.text import printable
from spalign.training.estimate import SHAPES, Estimate, estimate, plan_from, print_estimate

CHARACTERS = 4
"""Assumed of a token of a prompt; a tokenizer would have to be loaded."""


@dataclass(frozen=True, slots=True)
class Budget:
    """generated: {stage: tokens at most, every answer as long as it may be}. scores: of responses, an objective each.

    training: of one iteration, or why it is not known. hours of generation: without a rate None.
    """

    prompts: int
    heldout: int
    iterations: int
    generated: Mapping[str, int]
    scores: int
    training: Estimate | str
    rate: float | None
    price: float | None
    price_per_million: float | None

    @property
    def tokens(self) -> int:
        return sum(self.generated.values())

    @property
    def devices(self) -> int:
        return self.training.plan.devices if isinstance(self.training, Estimate) else 1

    @property
    def generation_hours(self) -> float | None:
        return self.tokens / (self.rate * self.devices) / 3600 if self.rate else None

    @property
    def training_hours(self) -> float | None:
        return self.iterations * self.training.hours if isinstance(self.training, Estimate) else None

    @property
    def money(self) -> float | None:
        """Device-hours and served tokens at their prices; None without a price, or where something that has one is of unknown size."""
        served = None if self.price_per_million is None else self.price_per_million * self.tokens / 1e6
        if self.price is None:
            return served
        hours = [self.training_hours, *([] if served is not None else [self.generation_hours])]
        if None in hours:
            return None
        return self.price * self.devices * math.fsum(h for h in hours if h is not None) + (served or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        known = isinstance(self.training, Estimate)
        return {
            "prompts": self.prompts,
            "heldout": self.heldout,
            "iterations": self.iterations,
            "generated_tokens": {**self.generated, "total": self.tokens},
            "scores": self.scores,
            "generation_hours": self.generation_hours,
            "training_hours": self.training_hours,
            "training": self.training.as_dict() if isinstance(self.training, Estimate) else None,
            "training_unknown": None if known else self.training,
            "money": self.money,
        }


def budget(
    config: RunConfig,
    device: str,
    *,
    options: Mapping[str, Any],
    gflops: float | None = None,
    memory_gb: float | None = None,
    rate: float | None = None,
    price: float | None = None,
    price_per_million: float | None = None,
) -> Budget:
    """options: of a training plan, over what the configuration says. rate: generated tokens/s of one device. price: of a device-hour.

    Raises SpalignError for prompts that cannot be read and for numbers that make no plan. Where a model's shape is not known that is no
    error: its training is not estimated, and the budget says so.
    """
    for name, value in (("--tokens-per-second", rate), ("--price", price), ("--price-per-million", price_per_million)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpalignError(f"{name} is {value}", hint="give a number above 0")
    train, heldout = (load_prompts(source, config.prompts) for source in (config.prompts.train, config.prompts.heldout))
    objectives = len(config.constitution_for_run().objectives)
    rounds = config.iterations
    each = math.ceil(len(train) / rounds) if config.new_prompts else len(train)
    held, most = len(heldout) * config.evaluation.samples, config.sample.max_new_tokens
    refining = responses_a_prompt(config) - config.sample.n
    answers = {"sample": rounds * each * config.sample.n, "refine": rounds * each * refining, "before": held, "after": held}
    scores = sum(answers.values()) + (each * config.sample.n if config.self_evaluation.reference_judge else 0)
    said = {
        "prompts": each,
        "responses": config.sample.n + 1,
        "prompt_tokens": max(1, math.ceil(sum(len(p.text) for p in train) / len(train) / CHARACTERS)),
        "response_tokens": most,
        **_training(config),
        **options,
    }
    training: Estimate | str
    try:
        training = estimate(plan_from(_shape_name(config.model), device, gflops=gflops, memory_gb=memory_gb, **said))
    except ModelError as e:
        training = e.message
    generated = {stage: number * most for stage, number in answers.items()}
    return Budget(len(train), len(heldout), rounds, generated, scores * objectives, training, rate, price, price_per_million)


def responses_a_prompt(config: RunConfig) -> int:
    """Candidates, refined drafts and the placebo's."""
    return config.sample.n + config.refine.drafts * (2 if config.refine.placebo else 1)


def prompts_in(source: PromptSource) -> int:
    """How many prompts there are at most; 0 where the source cannot be read from here."""
    if source.limit:
        return source.limit
    try:
        return len(load_prompts(source, PromptsConfig()))
    except SpalignError:
        return 0


def _training(config: RunConfig) -> dict[str, Any]:
    train, lora = config.train, config.train.lora
    method = "full" if lora is None else "qlora" if lora.base_dtype == "nf4" else "dora" if lora.dora else "lora"
    return {
        "method": method,
        "rank": 16 if lora is None else lora.r,
        "checkpointing": train.gradient_checkpointing,
        "epochs": train.epochs,
        "prompts_per_forward": train.prompts_per_forward,
        "prompts_per_step": train.prompts_per_step,
    }


def _shape_name(model: str) -> str:
    """A preset, a folder, or the config.json that the hub has of it. Raises ModelError."""
    if model in SHAPES or Path(model).expanduser().exists():
        return model
    from huggingface_hub import hf_hub_download

    try:
        return str(hf_hub_download(model, "config.json"))
    except Exception as e:  # of the hub, the network, a name that is none
        raise ModelError(f"model '{model}': no config.json to be had ({type(e).__name__})") from e


def print_budget(found: Budget, console: Any) -> None:
    """The budget as a table for a person."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="At most", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "prompts", f"{found.prompts:,} to train on, {found.heldout:,} held out, {found.iterations} iteration{'s' * (found.iterations > 1)}"
    )
    for stage, tokens in found.generated.items():
        table.add_row(f"  {stage}", f"{tokens:,} tokens")
    hours = f", {found.generation_hours:,.2f} h" if found.generation_hours is not None else "; hours: --tokens-per-second of a device"
    table.add_row("generated", f"{found.tokens:,} tokens{hours}", style="bold")
    table.add_row("scored", f"{found.scores:,} times a response on an objective; beside it the judge's check, once a model")
    if found.money is not None:
        table.add_row("money", f"{found.money:,.2f}, in the price's currency", style="bold")
    console.print(table)
    if isinstance(found.training, Estimate):
        console.print(Text("Training, of one iteration, if denoising kept every prompt:"))
        print_estimate(found.training, console)
    else:
        console.print(Text(f"training is not estimated: {printable(found.training)}", style="yellow"))
