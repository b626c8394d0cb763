"""The command line. Configuration is checked before anything heavy is imported."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer

from spalign.cli import align, look, prove
from spalign.cli.app import app, shown
from spalign.errors import SpalignError
from spalign.startup import slim

__all__ = ["align", "app", "look", "main", "prove"]


class _Lasting(io.FileIO):
    """An output that a run outlives: what a full disk or a closed terminal does not take is left out, and the program's end tells it."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as e:
            self.failed = e
            return len(data)


def main() -> None:
    """Entry point: errors as two lines without a traceback, with their exit code."""
    outputs = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, f"__{name}__")
        if stream and stream is getattr(sys, name):
            stream.flush()
            outputs.append(_Lasting(stream.fileno(), "wb", closefd=False))
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(outputs[-1]), stream.encoding, stream.errors, line_buffering=True))
    try:
        _main()
    except SystemExit as e:
        if not e.code and (failed := next((o.failed for o in outputs if o.failed), None)):
            said = "what it says could not all be written; the work itself is done"
            typer.echo(f"error: output: {failed.strerror}: {said}\n  fix: free some space, and the same command says it again", err=True)
            sys.exit(2)
        raise


def _main() -> None:
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
