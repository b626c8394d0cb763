"""The application that the commands join, and what they share. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spalign import __version__
from spalign.text import printable as shown

__all__ = ["ConfigFile", "RunPath", "Sets", "app", "loaded_config", "shown"]

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
RunPath = Annotated[Path, typer.Argument(help="Folder of a run, such as runs/demo.", show_default=False)]


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def loaded_config(path: Path, sets: list[str] | None, allow_weak_judge: bool = False) -> Any:
    """The run's configuration. Raises ConfigError with every mistake at once."""
    from spalign.config import load_config

    allowed = ("self_evaluation.allow_weak_judge=true",) if allow_weak_judge else ()
    return load_config(path, (*(sets or ()), *allowed))
