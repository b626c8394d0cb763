"""What a run takes, counted from its configuration and prompts before anything runs: tokens, scores, memory, hours, money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spalign.config import PromptsConfig, PromptSource, RunConfig
from spalign.engines.make import weights_of
from spalign.errors import ModelError, SpalignError
from spalign.pipeline.launch_file import launch_file
from spalign.prompts import load_prompts
from spalign.selfeval.likert import MAX_TOKENS, READINGS
from spalign.text import printable
from spalign.training.estimate import SHAPES, Estimate, estimate, plan_from, print_estimate

CHARACTERS = 4
"""Assumed of a token of a prompt; a tokenizer would have to be loaded."""
LEFT_OUT = "not counted: the judge's check (once a model), the guard's probes, and checkpoints that are tried where the gate fails"


@dataclass(frozen=True, slots=True)
class Budget:
    """generated: {stage: tokens, every answer as long as it may be}. scores: of responses, an objective each.

    training: of one iteration, or why it is not known. devices: what is paid for. engines: those of them that generate side by side.
    rate: generated tokens/s of one engine. price: of a device-hour.
    """

    prompts: int
    heldout: int
    iterations: int
    generated: Mapping[str, int]
    scores: int
    training: Estimate | str
    devices: int
    engines: int
    rate: float | None
    price: float | None

    @property
    def tokens(self) -> int:
        return sum(self.generated.values())

    @property
    def generation_hours(self) -> float | None:
        """Without a rate None. Scoring, which generates next to nothing, has no hours."""
        return self.tokens / (self.rate * self.engines) / 3600 if self.rate else None

    @property
    def training_hours(self) -> float | None:
        """Of all iterations."""
        return self.iterations * self.training.hours if isinstance(self.training, Estimate) else None

    @property
    def money(self) -> float | None:
        """All devices for the hours of generation and of training; None without a price, or where either is not known."""
        hours = (self.generation_hours, self.training_hours)
        if self.price is None or hours[0] is None or hours[1] is None:
            return None
        return self.price * self.devices * (hours[0] + hours[1])

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        known = self.training if isinstance(self.training, Estimate) else None
        return {
            "prompts": self.prompts,
            "heldout": self.heldout,
            "iterations": self.iterations,
            "generated_tokens": {**self.generated, "total": self.tokens},
            "scores": self.scores,
            "devices": self.devices,
            "generation_hours": self.generation_hours,
            "training_hours": self.training_hours,
            "money": self.money,
            "training": known.as_dict() if known else None,
            "training_unknown": None if known else self.training,
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
) -> Budget:
    """options: of a training plan, for what the configuration does not say (devices, sharding, efficiency, network, prompt_tokens).

    Raises SpalignError for prompts that cannot be read and for numbers that make no plan. Where a model's shape is not known that is no
    error: its training is not estimated, and the budget says so.
    """
    for name, value in (("--tokens-per-second", rate), ("--price", price)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SpalignError(f"{name} is {value}", hint="give a number above 0")
    train, heldout = (load_prompts(source, config.prompts) for source in (config.prompts.train, config.prompts.heldout))
    answers, scored = _answers(config, len(train), len(heldout))
    generated = {stage: number * config.sample.max_new_tokens for stage, number in answers.items()}
    objectives = [o.name for o in config.constitution_for_run().objectives]
    if likert := sum(n * sum(how.self_evaluation.scorer_of(o) == "likert" for o in objectives) for how, n in scored):
        generated["scores by likert"] = likert * READINGS * MAX_TOKENS
    said = {
        "prompts": math.ceil(len(train) / config.iterations) if config.new_prompts else len(train),
        "responses": config.sample.n + 1,
        "prompt_tokens": max(1, math.ceil(sum(len(p.text) for p in train) / len(train) / CHARACTERS)),
        "response_tokens": config.sample.max_new_tokens,
        **_training(config),
        **options,
    }
    training: Estimate | str
    try:
        if config.train.lora and config.train.lora.base_dtype == "float32":
            raise ModelError("a base in float32 is not counted (train.lora.base_dtype; with auto or bfloat16 it is half as large)")
        training = estimate(plan_from(_shape_name(config), device, gflops=gflops, memory_gb=memory_gb, **said))
    except ModelError as e:
        training = e.message
    workers = config.engine.workers or said["devices"] if config.engine.kind == "ray" else 1
    devices = max(int(said["devices"]), int(workers))
    scores = len(objectives) * sum(n for _, n in scored)
    return Budget(len(train), len(heldout), config.iterations, generated, scores, training, devices, int(workers), rate, price)


def _answers(config: RunConfig, train: int, heldout: int) -> tuple[dict[str, int], list[tuple[RunConfig, int]]]:
    """{stage: answers}; and under which recipe how many are scored, on every objective."""
    sampled = sampled_prompts(config, train)
    held = heldout * config.evaluation.samples
    answers = {
        "sample": sampled * config.sample.n,
        "refine": sampled * (responses_a_prompt(config) - config.sample.n),
        "before": held,
        "after": held,
    }
    first = math.ceil(train / config.iterations) if config.new_prompts else train
    again = first * config.sample.n if config.self_evaluation.reference_judge else 0
    scored = [(config, sum(answers.values()) + again)]
    for recipe in config.compare:  # on the first iteration's candidates, without a placebo
        other = config.with_recipe(recipe)
        answers[f"compare {recipe}"] = first * other.refine.drafts
        scored.append((other, first * (config.sample.n + other.refine.drafts)))
    return answers, scored


def sampled_prompts(config: RunConfig, train: int) -> int:
    """Prompts that are sampled over all iterations; with `new_prompts` each once."""
    return train if config.new_prompts else train * config.iterations


def responses_a_prompt(config: RunConfig) -> int:
    """Candidates, refined drafts and the placebo's."""
    return config.sample.n + config.refine.drafts * (2 if config.refine.placebo else 1)


def prompts_in(source: PromptSource, how: PromptsConfig) -> int:
    """How many prompts there are at most; 0 where the source cannot be read from here."""
    if source.limit:
        return source.limit
    try:
        return len(load_prompts(source, how))
    except SpalignError:
        return 0


def _training(config: RunConfig) -> dict[str, Any]:
    train, lora = config.train, config.train.lora
    method = "full" if lora is None else "qlora" if lora.base_dtype == "nf4" else "dora" if lora.dora else "lora"
    together: dict[str, Any] = {"devices": 1}
    if train.accelerate:
        file = launch_file(train.accelerate)
        sharding = {"FSDP": "fsdp2", "DEEPSPEED": "zero3"}.get(file.distributed_type.value, "ddp")
        together = {"devices": file.num_processes, "sharding": sharding}
    return {
        **together,
        "method": method,
        "rank": 16 if lora is None else lora.r,
        "checkpointing": train.gradient_checkpointing,
        "epochs": train.epochs,
        "prompts_per_forward": train.prompts_per_forward,
        "prompts_per_step": train.prompts_per_step,
    }


def _shape_name(config: RunConfig) -> str:
    """A preset, a folder, or the config.json that the hub has of the policy. Raises ModelError."""
    model = weights_of(config.model, config.engine) or config.model
    if model in SHAPES:
        return model
    if model.lower().endswith(".gguf"):
        raise ModelError(f"model '{model}': the shape of a GGUF file is not read", hint="--model with a preset or a folder like it")
    try:
        if Path(model).expanduser().exists():
            return model
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(model, "config.json"))
    except Exception as e:  # of the hub, the network, a name that is none
        raise ModelError(f"model '{model[:100]}': no config.json to be had ({type(e).__name__})") from e


def print_budget(found: Budget, console: Any) -> None:
    """The budget as a table for a person."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Every answer as long as it may be", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    iterations = f"{found.iterations} iteration{'s' * (found.iterations > 1)}"
    table.add_row("prompts", f"{found.prompts:,} to train on, {found.heldout:,} held out, {iterations}")
    for stage, tokens in found.generated.items():
        table.add_row(f"  {stage}", f"{tokens:,} tokens")
    hours = f", {found.generation_hours:,.2f} h" if found.generation_hours is not None else "; hours: --tokens-per-second of an engine"
    table.add_row("generated", f"{found.tokens:,} tokens{hours}", style="bold")
    table.add_row("scored", f"{found.scores:,} times a response on an objective; its hours depend on the scorer and are not counted")
    if found.training_hours is not None:
        table.add_row("training", f"{found.training_hours:,.2f} h, {iterations}", style="bold")
    if found.money is not None:
        table.add_row("money", f"{found.money:,.2f}, in the price's currency, {found.devices} x device", style="bold")
    console.print(table)
    console.print(Text(LEFT_OUT, style="dim"))
    if isinstance(found.training, Estimate):
        console.print(Text("\nTraining, of one iteration, if denoising kept every prompt:"))
        print_estimate(found.training, console)
    else:
        console.print(Text(f"training is not estimated: {printable(found.training)}", style="yellow"))
