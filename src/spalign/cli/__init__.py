"""The command line. Configuration is checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys

import typer

from spalign.cli import align, look, prove
from spalign.cli.app import app, shown
from spalign.errors import SpalignError
from spalign.startup import slim

__all__ = ["align", "app", "look", "main", "prove"]


def main() -> None:
    """Entry point: errors as two lines without a traceback, with their exit code."""
    slim()
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
    except ModuleNotFoundError as e:
        if e.name is None or e.name.startswith("spalign"):
            raise
        typer.echo(f"error: the package '{e.name}' is not installed\n  fix: pip install 'spalign[all]'", err=True)
        sys.exit(2)
    except SpalignError as e:
        kind = "stopped" if e.exit_code in (3, 4) else "error"
        typer.echo(f"{kind}: {shown(str(e))}", err=True)
        sys.exit(e.exit_code)
