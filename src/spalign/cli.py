"""The command line. Configuration is checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spalign import __version__
from spalign.errors import NothingToTrainOn, SpalignError

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
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew; an old run of this name is set aside, not deleted.")]


@app.command()
def run(config: ConfigFile, set_: Sets = None, resume: Resume = False, fresh: Fresh = False) -> None:
    """Run the whole method: sample, self-evaluate, refine, denoise, pair, train, evaluate."""
    from spalign.pipeline import run as run_pipeline
    from spalign.report import Progress, print_summary

    ui = Progress()
    if resume and fresh:
        raise SpalignError("--resume and --fresh exclude each other", hint="give one of them")
    mode: Any = "resume" if resume else "fresh" if fresh else "auto"
    outcome = run_pipeline(_config(config, set_), mode=mode, ui=ui)
    assert outcome.summary is not None
    print_summary(outcome.summary, ui.console)
    if not outcome.new:
        ui.line(f"everything is done already; {outcome.folder / 'summary.json'}", style="bold")


def _stage_command(name: str, what: str) -> None:
    def command(config: ConfigFile, set_: Sets = None, resume: Resume = False) -> None:
        from spalign.pipeline import run as run_pipeline
        from spalign.report import Progress

        ui = Progress()
        loaded = _config(config, set_)
        outcome = run_pipeline(loaded, mode="resume" if resume else "auto", only=name, ui=ui)
        ui.line(f"{name}: {'done' if outcome.new else 'was done already'}; {outcome.folder}")

    command.__doc__ = what
    app.command(name)(command)


_stage_command("sample", "Stage 1: sample candidate responses.")
_stage_command("evaluate", "Stage 2: let the policy score its candidates.")
_stage_command("refine", "Stage 3: write refined responses and their placebo, and score them.")
_stage_command("denoise", "Stage 4: keep the prompts that pass both criteria.")
_stage_command("pair", "Stage 5: make preference pairs.")
_stage_command("train", "Stage 6: train on the pairs.")


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _config(path: Path, sets: list[str] | None) -> Any:
    from spalign.config import load_config

    return load_config(path, tuple(sets or ()))


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
        kind = "stopped" if isinstance(e, NothingToTrainOn) else "error"
        typer.echo(f"{kind}: {_shown(str(e))}", err=True)
        sys.exit(e.exit_code)


def _shown(text: str) -> str:
    from spalign.text import printable

    return printable(text)


if __name__ == "__main__":
    main()
