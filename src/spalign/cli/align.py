"""Commands on the way to an aligned model: a configuration, a run or one stage of it, what training takes, merged and mixed models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spalign.cli.app import ConfigFile, Sets, app, loaded_config, shown
from spalign.errors import HubError, SpalignError

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run, also if its configuration changed.")]
AllowWeak = Annotated[bool, typer.Option("--allow-weak-judge", help="Go on where labelled answers show that the judge is weak.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; an old run of this name is set aside, not deleted.")]


@app.command()
def init(
    config: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.yaml"),
    model: Annotated[str | None, typer.Option(help="Hub id, local folder, GGUF file, or `demo`.", show_default="asked")] = None,
    train: Annotated[str | None, typer.Option(help="Prompts to train on.", show_default="asked")] = None,
    heldout: Annotated[str, typer.Option(help="Prompts to compare before and after on.")] = "high_stakes_heldout",
    constitution: Annotated[str, typer.Option(help="harmless_helpful or honest_helpful, to be changed.")] = "harmless_helpful",
) -> None:
    """Write a commented configuration and a constitution to begin with, asking only what it must."""
    from spalign.pipeline.start import init as begin

    asks = sys.stdin.isatty()
    model = model or (typer.prompt("Model (hub id, folder, GGUF file)", default="demo") if asks else "demo")
    train = train or (
        typer.prompt("Training prompts (file, org/dataset, shipped set)", default="high_stakes_train") if asks else "high_stakes_train"
    )
    for path in begin(config, model=model, train=train, heldout=heldout, constitution=constitution):
        typer.echo(f"written: {shown(str(path))}")
    typer.echo(f"next: spalign validate {shown(str(config))}")


@app.command()
def validate(config: ConfigFile, set_: Sets = None) -> None:
    """Check a configuration with its constitution, prompts and model's name, all mistakes at once; no model is loaded."""
    from spalign.pipeline.start import validate as check
    from spalign.report import Progress

    ui = Progress()
    found = check(loaded_config(config, set_), ui)
    ui.line(
        f"ok: {found['train']:,} training and {found['heldout']:,} held-out prompts, objectives {', '.join(found['objectives'])}; "
        f"the run will be {found['folder']}"
    )


@app.command()
def run(config: ConfigFile, set_: Sets = None, resume: Resume = False, fresh: Fresh = False, allow_weak_judge: AllowWeak = False) -> None:
    """Run the whole method: sample, self-evaluate, refine, denoise, pair, train, evaluate."""
    from spalign.pipeline import run as run_pipeline
    from spalign.report import Progress, print_summary
    from spalign.store import read_json

    ui = Progress()
    if resume and fresh:
        raise SpalignError("--resume and --fresh exclude each other", hint="give one of them")
    mode: Any = "resume" if resume else "fresh" if fresh else "auto"
    loaded = loaded_config(config, set_, allow_weak_judge)
    try:
        outcome = run_pipeline(loaded, mode=mode, ui=ui)
    except HubError:  # the run itself is done
        print_summary(read_json(loaded.folder / "summary.json"), ui.console)
        raise
    assert outcome.summary is not None
    print_summary(outcome.summary, ui.console)
    if not outcome.new:
        ui.line(f"everything is done already; {outcome.folder / 'summary.json'}", style="bold")


def _stage_command(name: str, what: str) -> None:
    def command(config: ConfigFile, set_: Sets = None, resume: Resume = False, allow_weak_judge: AllowWeak = False) -> None:
        from spalign.pipeline import run as run_pipeline
        from spalign.report import Progress

        ui = Progress()
        loaded = loaded_config(config, set_, allow_weak_judge)
        outcome = run_pipeline(loaded, mode="resume" if resume else "auto", only=name, ui=ui)
        ui.line(f"{name}: {'done' if outcome.new else 'was done already'}; {outcome.folder}")

    command.__doc__ = what
    app.command(name)(command)


_stage_command("sample", "Stage 1: sample candidate responses.")
_stage_command("evaluate", "Stage 2: score the candidates.")
_stage_command("refine", "Stage 3: write refined responses and their placebo, and score them.")
_stage_command("denoise", "Stage 4: keep the prompts that pass both criteria.")
_stage_command("pair", "Stage 5: make preference pairs.")
_stage_command("train", "Stage 6: train on the pairs.")


@app.command()
def soup(
    first: Annotated[Path, typer.Argument(help="Folder of a whole model.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Folder of another one of the same base.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the new model.", show_default=False)],
    ratio: Annotated[str, typer.Option(help="Weight of the first to weight of the second.")] = "5:5",
) -> None:
    """Interpolate the weights of two models (Reward Soups)."""
    from spalign.training.soup import parse_ratio
    from spalign.training.soup import soup as mix

    typer.echo(f"written: {mix(first, second, out, weight=parse_ratio(ratio))}")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA or DoRA adapter.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the merged model; new or empty.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter names")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Merge an adapter into its base model: safetensors, tokenizer, generation config and chat template."""
    from spalign.training.merge import merge as merge_adapter

    done = merge_adapter(adapter, out, model=model, dtype=dtype)
    typer.echo(shown(f"merged into {out}: {done.parameters / 1e6:,.1f}M parameters, {done.dtype}, {done.modules} modules changed"))


_OF_A_RUN = "the run's; without one "
_TRAINING = {
    "method": "train.lora",
    "rank": "train.lora.r",
    "prompts": "prompts.train.limit",
    "responses": "sample.n",
    "response_tokens": "sample.max_new_tokens",
    "prompts_per_forward": "train.prompts_per_forward",
    "prompts_per_step": "train.prompts_per_step",
    "checkpointing": "train.gradient_checkpointing",
    "epochs": "train.epochs",
}
"""Options of `estimate` that a run's configuration says, and where."""
_FOR_A_RUN = {"tokens_per_second": "--tokens-per-second", "price": "--price", "set_": "--set"}


@app.command("estimate")
def estimate_command(  # noqa: PLR0913, PLR0917  an option each
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="A run's YAML file: all of the run, not only training.", show_default="none")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Without a run: llama-8b, llama-70b, demo, or a local folder with a config.json.", show_default="none"),
    ] = None,
    method: Annotated[str, typer.Option(help="full, lora, dora or qlora (4-bit base).", show_default=_OF_A_RUN + "full")] = "full",
    rank: Annotated[int, typer.Option(help="The adapter's rank.", show_default=_OF_A_RUN + "16")] = 16,
    devices: Annotated[int, typer.Option(help="How many devices.", show_default="of train.accelerate, else 1")] = 1,
    device: Annotated[str, typer.Option(help="h200, h100, a100, or cpu (with --gflops).")] = "h200",
    sharding: Annotated[str, typer.Option(help="ddp, fsdp2 or zero3.", show_default="of train.accelerate, else ddp")] = "ddp",
    prompts: Annotated[int, typer.Option(help="Training prompts.", show_default=_OF_A_RUN + "10000")] = 10_000,
    responses: Annotated[int, typer.Option(help="Responses a prompt.", show_default=_OF_A_RUN + "5")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", show_default="of the run's prompts; without one 128")] = 128,
    response_tokens: Annotated[int, typer.Option(help="Tokens of a response.", show_default=_OF_A_RUN + "512")] = 512,
    prompts_per_forward: Annotated[int, typer.Option(help="Prompts in a device's forward pass.", show_default=_OF_A_RUN + "1")] = 1,
    prompts_per_step: Annotated[
        int | None,
        typer.Option(help="Prompts in an optimiser step, over all devices.", show_default=_OF_A_RUN + "from 8 on"),
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Keep layer inputs alone; one forward more.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the prompts.", show_default=_OF_A_RUN + "1")] = 1.0,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the device's peak that is reached.", show_default="what an H200 reached: 0.49, adapters 0.33"),
    ] = None,
    network_gb: Annotated[float, typer.Option(help="GB/s between nodes, a device, in one direction: an assumption.")] = 50.0,
    gflops: Annotated[float | None, typer.Option(help="The device's bf16 GFLOP/s.", show_default="the data sheet's")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="The device's memory.", show_default="the data sheet's")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Tokens that one engine generates a second: gives a run's hours.", show_default="none")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of a device-hour: gives a run's money.", show_default="none")] = None,
    set_: Sets = None,
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
) -> None:
    """Say what a run, or training alone, will take: tokens, memory, hours, money; and what to change if it does not fit. Loads no model."""
    import json

    from rich.console import Console

    options: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "devices": devices,
        "sharding": sharding,
        "prompts": prompts,
        "responses": responses,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "prompts_per_forward": prompts_per_forward,
        "prompts_per_step": prompts_per_step,
        "checkpointing": checkpointing,
        "epochs": epochs,
        "efficiency": efficiency,
        "network": network_gb * 1e9,
    }
    given = {name for name in context.params if _given(context, name)}
    found: Any
    if config is not None and model is None:
        from spalign.pipeline.budget import budget, print_budget

        if said := [name for name in _TRAINING if name in given]:
            raise SpalignError(f"{said[0]} is what the run says", hint=f"--set {_TRAINING[said[0]]}=...")
        given = {"network" if name == "network_gb" else name for name in given}
        own = {name: value for name, value in options.items() if name in given}
        loaded = loaded_config(config, set_)
        found = budget(loaded, device, gflops=gflops, memory_gb=memory_gb, options=own, rate=tokens_per_second, price=price)
        show: Any = print_budget
    elif model is not None and config is None:
        from spalign.training.estimate import estimate, plan_from, print_estimate

        if unused := [flag for name, flag in _FOR_A_RUN.items() if name in given]:
            raise SpalignError(f"{unused[0]} is for a run", hint="spalign estimate RUN.yaml")
        found, show = estimate(plan_from(model, device, gflops=gflops, memory_gb=memory_gb, **options)), print_estimate
    else:
        raise SpalignError("estimate what?", hint="a run: spalign estimate RUN.yaml; or training alone: spalign estimate --model NAME")
    if json_:
        typer.echo(json.dumps(found.as_dict()))
    else:
        show(found, Console())


def _given(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
