"""The command line. Configuration is checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spalign import __version__
from spalign.errors import HubError, SpalignError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a language model trustworthy first, helpful second (SPA).",
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one option of the config; can be repeated.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run, also if its configuration changed.")]
AllowWeak = Annotated[bool, typer.Option("--allow-weak-judge", help="Go on where labelled answers show that the judge is weak.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; an old run of this name is set aside, not deleted.")]


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
    loaded = _config(config, set_, allow_weak_judge)
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
        loaded = _config(config, set_, allow_weak_judge)
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


@app.command("judge-check")
def judge_check(  # noqa: PLR0913, PLR0917  an option each
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or `demo`.")],
    scorer: Annotated[list[str] | None, typer.Option(help="A scorer, `auto` or `all`; can be repeated.", show_default="auto")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled answers: JSONL, CSV, Parquet (prompt, response, objective, label).", show_default="shipped"),
    ] = None,
    objective: Annotated[list[str] | None, typer.Option(help="An objective; can be repeated.", show_default="the constitution's")] = None,
    constitution: Annotated[str, typer.Option(help="A shipped constitution or a YAML file.")] = "harmless_helpful",
    bad_recall: Annotated[
        float | None,
        typer.Option(help="Threshold that leaves this share of the bad answers below it.", show_default="equal errors"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write what a run can use (self_evaluation.judge_file).")] = Path("judge.yaml"),
    base_url: Annotated[
        str | None, typer.Option(help="Server of the model (OpenAI protocol); the key is OPENAI_API_KEY.", show_default="here")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False,
) -> None:
    """Measure how well a model can judge, asked in every way, and recommend a scorer and a threshold per objective."""
    import json

    from spalign.config import engine_at
    from spalign.pipeline.judging import check_model
    from spalign.report import Progress, print_judge

    ui = Progress()
    found = check_model(
        model,
        constitution=constitution,
        scorers=scorer or ["auto"],
        data=data,
        names=objective or [],
        bad_recall=bad_recall,
        out=out,
        ui=ui,
        engine=engine_at(base_url),
    )
    print_judge(found, ui.console)
    ui.line(f"written: {out}" if found["recommended"] else "nothing written: no scorer can be recommended", style="bold")
    if json_:
        typer.echo(json.dumps(found))


@app.command()
def judge(
    config: ConfigFile, set_: Sets = None, json_: Annotated[bool, typer.Option("--json", help="End with one line of JSON.")] = False
) -> None:
    """Have the answers of one model or several judged on a prompt set (Inspect): scores, win/tie/lose, MMLU, MT-Bench, with intervals."""
    import json

    from spalign.config import load_assess

    loaded = load_assess(config, tuple(set_ or ()))
    from spalign.pipeline.assess import assess
    from spalign.report import Progress, assess_table

    ui = Progress()
    found = assess(loaded, ui=ui)
    typer.echo(_shown(assess_table(found)))
    ui.line(f"{loaded.folder / 'results.json'}; logs: inspect view --log-dir {loaded.folder}", style="bold")
    if json_:
        typer.echo(json.dumps(found))


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
        typer.echo(f"written: {_shown(str(path))}")
    typer.echo(f"next: spalign validate {_shown(str(config))}")


@app.command()
def validate(config: ConfigFile, set_: Sets = None) -> None:
    """Check a configuration with its constitution, prompts and model's name, all mistakes at once; no model is loaded."""
    from spalign.pipeline.start import validate as check
    from spalign.report import Progress

    ui = Progress()
    found = check(_config(config, set_, False), ui)
    ui.line(
        f"ok: {found['train']:,} training and {found['heldout']:,} held-out prompts, objectives {', '.join(found['objectives'])}; "
        f"the run will be {found['folder']}"
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the data.", show_default=False)],
    to: Annotated[str, typer.Option(help="trl, llama-factory, axolotl or parquet.")] = "trl",
    iteration: Annotated[int | None, typer.Option(help="Which iteration's pairs.", show_default="the last")] = None,
) -> None:
    """Write a run's preference pairs for another trainer, with a data card."""
    from spalign.pipeline.export import export as write

    path, count = write(run, out, to=to, iteration=iteration)
    typer.echo(f"written: {count:,} pairs, {_shown(str(path))}")


RunPath = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/demo.", show_default=False)]


@app.command()
def show(
    run: RunPath,
    prompt: Annotated[str | None, typer.Argument(help="Id of one prompt.", show_default="all, a line each")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Texts in full.")] = False,
) -> None:
    """Show a run: funnel and a line a prompt; or all about one prompt: responses, scores, verdict, pairs, answers before and after."""
    from spalign.pipeline.look import one_prompt, overview
    from spalign.report import Progress
    from spalign.report.show import print_prompt, print_run

    console = Progress().console
    if prompt is None:
        print_run(overview(run), console)
    else:
        print_prompt(one_prompt(run, prompt), console, whole=whole)


@app.command()
def report(run: RunPath) -> None:
    """Write report.html: verdict, funnel, pictures, and every prompt with its answers; one file, nothing is loaded from elsewhere."""
    from spalign.pipeline.report import write_report

    typer.echo(_shown(f"written: {write_report(run)}"))


@app.command()
def compare(first: RunPath, second: RunPath) -> None:
    """Hold two finished runs side by side: options that differ, funnels, before and after, gates."""
    from spalign.pipeline.look import summary_of
    from spalign.report import Progress
    from spalign.report.show import print_comparison

    print_comparison([summary_of(first), summary_of(second)], Progress().console)


@app.command("what-if")
def what_if(  # noqa: PLR0913, PLR0917  an option each
    run: RunPath,
    set_: Sets = None,
    threshold: Annotated[list[str] | None, typer.Option(metavar="OBJECTIVE=SCORE", help="Met from this score; none: never.")] = None,
    resolution: Annotated[list[str] | None, typer.Option(metavar="OBJECTIVE=WIDTH", help="Bin width of scores; none: continuous.")] = None,
    order: Annotated[str | None, typer.Option(help="Objectives, comma-separated, the first the most important.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="A.B=V1,V2,...", help="A line for each value of one option.")] = None,
    iteration: Annotated[int, typer.Option(help="Which iteration's scores.")] = 1,
    apply: Annotated[bool, typer.Option("--apply", help="Write stages 4 and 5 anew under these options.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON instead of tables.")] = False,
) -> None:
    """Say what a run would have kept under another tau, delta, alpha, threshold, rule or order: nothing is generated or scored."""
    import json

    from spalign.pipeline.what_if import apply_to, choice_from, stored, sweep_of
    from spalign.pipeline.what_if import what_if as try_
    from spalign.report import Progress
    from spalign.report.what_if import print_sweep, print_what_if

    ui, there = Progress(), stored(run, iteration)
    own, choice = choice_from(), choice_from(set_ or (), threshold or (), resolution or (), order)
    option, choices = sweep_of(sweep, choice) if sweep else ("", {})
    found = {"the run": try_(there, own), **({"what if": try_(there, choice)} if choice != own else {})}
    swept = {value: try_(there, one) for value, one in choices.items()}
    if json_:
        typer.echo(json.dumps({**found, "sweep": swept}))
    else:
        print_what_if(found, ui.console)
        if swept:
            print_sweep(option, swept, ui.console)
    if apply:
        apply_to(there, choice, ui)
        ui.line(f"written: {run}/iteration-{iteration}/4-denoise and 5-pair; train: spalign run {run}/config.yaml --resume", style="bold")


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="A table of the paper (table1, ...), or a .yaml file of your own.", show_default=False)],
    scale: Annotated[str, typer.Option(help="full, or another one that the file has, such as demo.")] = "full",
    set_: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it will take.")] = False,
) -> None:
    """Train and judge what a table of the paper compares, and print it with the paper's figures beside ours. Goes on where it stopped."""
    from spalign.config import load_experiment

    loaded = load_experiment(name, scale, tuple(set_ or ()))
    from spalign.pipeline.experiment import cost
    from spalign.pipeline.experiment import experiment as do
    from spalign.report import Progress
    from spalign.report.experiment import experiment_table

    ui = Progress()
    ui.line(f"{name}: {loaded.title}", style="bold")
    for what, count in cost(loaded).items():
        ui.line(f"  {what.replace('_', ' ')}: at most {count:,}")
    if dry_run:
        return
    label = f"{Path(name).stem}-{scale}"
    found = do(loaded, label, ui=ui)
    typer.echo(_shown(experiment_table(found)))
    ui.line(f"{Path(loaded.runs_dir) / label}.md and .json", style="bold")


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
    typer.echo(_shown(f"merged into {out}: {done.parameters / 1e6:,.1f}M parameters, {done.dtype}, {done.modules} modules changed"))


@app.command("estimate")
def estimate_command(  # noqa: PLR0913, PLR0917  an option each
    model: Annotated[str, typer.Option(help="llama-8b, llama-70b, demo, or a local folder with a config.json.")],
    method: Annotated[str, typer.Option(help="full, lora, dora or qlora (4-bit base).")] = "full",
    rank: Annotated[int, typer.Option(help="The adapter's rank.")] = 16,
    devices: Annotated[int, typer.Option(help="How many devices.")] = 1,
    device: Annotated[str, typer.Option(help="h200, h100, a100, or cpu (with --gflops).")] = "h200",
    sharding: Annotated[str, typer.Option(help="ddp, fsdp2 or zero3.")] = "ddp",
    prompts: Annotated[int, typer.Option(help="Training prompts.")] = 10_000,
    responses: Annotated[int, typer.Option(help="Responses a prompt.")] = 5,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 128,
    response_tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 512,
    prompts_per_forward: Annotated[int, typer.Option(help="Prompts in a device's forward pass.")] = 1,
    prompts_per_step: Annotated[
        int | None, typer.Option(help="Prompts in an optimiser step, over all devices.", show_default="from 8 on")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Keep layer inputs alone; one forward more.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the prompts.")] = 1.0,
    efficiency: Annotated[float, typer.Option(help="Share of the device's peak that is reached: an assumption.")] = 0.5,
    network_gb: Annotated[float, typer.Option(help="GB/s between nodes, a device, in one direction: an assumption.")] = 50.0,
    gflops: Annotated[float | None, typer.Option(help="The device's bf16 GFLOP/s.", show_default="the data sheet's")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="The device's memory.", show_default="the data sheet's")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
) -> None:
    """Say what memory and time training will need, and what to change if it does not fit. Loads no model."""
    import json

    from rich.console import Console

    from spalign.training.estimate import estimate, plan_from, print_estimate

    plan = plan_from(
        model,
        device,
        gflops=gflops,
        memory_gb=memory_gb,
        method=method,
        rank=rank,
        devices=devices,
        sharding=sharding,
        prompts=prompts,
        responses=responses,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        prompts_per_forward=prompts_per_forward,
        prompts_per_step=prompts_per_step,
        checkpointing=checkpointing,
        epochs=epochs,
        efficiency=efficiency,
        network=network_gb * 1e9,
    )
    found = estimate(plan)
    if json_:
        typer.echo(json.dumps(found.as_dict()))
    else:
        print_estimate(found, Console())


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _config(path: Path, sets: list[str] | None, allow_weak_judge: bool) -> Any:
    from spalign.config import load_config

    allowed = ("self_evaluation.allow_weak_judge=true",) if allow_weak_judge else ()
    return load_config(path, (*(sets or ()), *allowed))


def main() -> None:
    """Entry point: errors as two lines without a traceback, with their exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code != 130:  # typer turns Ctrl-C into exit code 130
            raise
        typer.echo("\ninterrupted; what is finished is kept: the same command goes on", err=True)
        sys.exit(130)
    except SpalignError as e:
        kind = "stopped" if e.exit_code in (3, 4) else "error"
        typer.echo(f"{kind}: {_shown(str(e))}", err=True)
        sys.exit(e.exit_code)


def _shown(text: str) -> str:
    from spalign.text import printable

    return printable(text)


if __name__ == "__main__":
    main()
