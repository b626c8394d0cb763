"""Progress of long stages: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from spalign.text import printable

_EVERY = 20.0  # seconds between lines where there is no terminal

Tick = Callable[[int], None]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "-/s", style="dim")


class Progress:
    """Where the run talks. `stage` wraps a long stage; `line` prints one fact."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.quiet = quiet

    def line(self, text: str, *, style: str = "") -> None:
        if not self.quiet:
            self.console.print(Text(printable(text), style=style))

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Tick]:
        """A tick, from any thread, advances the stage by so many units; entering and leaving prints what it did and how fast."""
        began, done, told = time.monotonic(), 0, time.monotonic()
        lock = threading.Lock()
        bars = (
            Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn(unit),
                _Rate(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            if self.console.is_terminal and not self.quiet
            else None
        )
        if bars is None:
            self.line(f"{name}: {total} {unit}")
        with bars or contextlib.nullcontext():
            task = bars.add_task(name, total=total) if bars else None

            def tick(count: int) -> None:
                nonlocal done, told
                with lock:
                    done += count
                    if bars and task is not None:
                        bars.advance(task, count)
                    elif time.monotonic() - told > _EVERY:
                        told = time.monotonic()
                        rate = done / (told - began)
                        # the first of many side by side say nothing of how long the others take
                        pace = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if done >= max(1, min(20, total / 50)) else ""
                        self.line(f"{name}: {done}/{total} {unit}{pace}")

            yield tick
        seconds = time.monotonic() - began
        self.line(f"{name}: {done} {unit} in {seconds:.0f} s ({done / max(seconds, 1e-9):.1f}/s)", style="dim" if bars else "")
