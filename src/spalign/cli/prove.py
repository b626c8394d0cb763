"""Commands that say what a judge or a model is worth: judge-check, judge, experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spalign.cli.app import ConfigFile, Sets, app, shown


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
    typer.echo(shown(assess_table(found)))
    ui.line(f"{loaded.folder / 'results.json'}; logs: inspect view --log-dir {loaded.folder}", style="bold")
    if json_:
        typer.echo(json.dumps(found))


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
    typer.echo(shown(experiment_table(found)))
    ui.line(f"{Path(loaded.runs_dir) / label}.md and .json", style="bold")
