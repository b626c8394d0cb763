"""Commands that look at a run: show, report, compare, what-if; and that hand its pairs to other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spalign.cli.app import RunPath, Sets, app, shown


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

    typer.echo(shown(f"written: {write_report(run)}"))


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
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the data.", show_default=False)],
    to: Annotated[str, typer.Option(help="trl, llama-factory, axolotl or parquet.")] = "trl",
    iteration: Annotated[int | None, typer.Option(help="Which iteration's pairs.", show_default="the last")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Also push OUT as a data set; private where new.")] = None,
) -> None:
    """Write a run's preference pairs for another trainer, with a data card."""
    from spalign.pipeline.export import export as write

    if push_to_hub is not None:
        from spalign.pipeline.publish import check_hub

        check_hub(push_to_hub, "--push-to-hub")
    path, count = write(run, out, to=to, iteration=iteration)
    typer.echo(f"written: {count:,} pairs, {shown(str(path))}")
    if push_to_hub is not None:
        from spalign.pipeline.publish import push_data

        typer.echo(shown(f"pushed to {push_data(out, push_to_hub)}"))
