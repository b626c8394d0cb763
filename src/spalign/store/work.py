"""The parts of a stage done one after the other, or side by side; what is on disk is not done again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from spalign.files import Row
from spalign.store.parts import Part
from spalign.store.stages import Stage

Item = TypeVar("Item")


class Crew(Protocol):
    """Who does the parts: so many at the same time, each in a thread of its own."""

    @property
    def width(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Generated so far by the calling thread."""
        ...

    def stop(self) -> None:
        """Have what is under way in other threads fail soon."""
        ...


class Alone:
    """One part at a time, and nothing generated."""

    width, tokens = 1, 0

    def stop(self) -> None:
        pass


def run_in_parts(
    stage: Stage, items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], list[Row]], *, crew: Crew | None = None
) -> dict[str, Any]:
    """Do `work` on `items`, `size` at a time, one part file each; parts that are on disk are not done again. Returns the manifest."""

    def shard(start: int) -> Sequence[Item]:
        return items[start : start + size]

    return _run(stage, [partial(shard, start) for start in range(0, len(items), size)], len(items), work, crew or Alone())


def run_over_parts(
    stage: Stage,
    source: Stage,
    read: Callable[[bytes], Item],
    work: Callable[[Sequence[Item]], list[Row]],
    *,
    crew: Crew | None = None,
) -> dict[str, Any]:
    """As `run_in_parts` for the rows of a finished stage: part by part, one of which a thread has in memory."""

    def items(part: Part) -> list[Item]:
        return [read(line) for line in part.lines()]

    parts = source.finished_parts()
    return _run(stage, [partial(items, part) for part in parts], (source.manifest() or {})["items"], work, crew or Alone())


def _run(
    stage: Stage,
    shards: Sequence[Callable[[], Sequence[Item]]],
    count: int,
    work: Callable[[Sequence[Item]], list[Row]],
    crew: Crew,
) -> dict[str, Any]:
    if (done := stage.manifest()) is not None:
        return done
    progress = stage.begin()
    began, before, tokens = time.perf_counter(), progress["seconds"], progress["tokens"]
    lock = threading.Lock()

    def note(new_tokens: int = 0, healed: int = 0) -> None:
        nonlocal tokens
        with lock:
            tokens += new_tokens
            stage.healed += healed
            stage.note(seconds=before + time.perf_counter() - began, tokens=tokens)

    def do(number: int) -> None:
        counted = crew.tokens
        with stage.recording(number) as journal:
            healed = journal.healed
            if healed:
                note(healed=healed)
            stage.write_part(number, work(shards[number]()))
        note(crew.tokens - counted, journal.healed - healed)

    _abreast(do, [n for n, shard in enumerate(shards) if not stage.has_part(n, shard)], crew)
    healed = {"healed_lines": stage.healed} if stage.healed else {}
    return stage.finish(items=count, seconds=round(before + time.perf_counter() - began, 3), tokens=tokens, **healed)


def _abreast(do: Callable[[int], None], numbers: Sequence[int], crew: Crew) -> None:
    """`do` every number. After an error or an interruption the crew is stopped; it is raised when no thread works any more."""
    if crew.width < 2:
        for n in numbers:
            do(n)
        return
    waiting, running = iter(numbers), set[Future[None]]()
    with ThreadPoolExecutor(crew.width, thread_name_prefix="part") as threads:
        try:
            while True:
                running |= {threads.submit(do, n) for n in islice(waiting, crew.width - len(running))}
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            crew.stop()
            raise
