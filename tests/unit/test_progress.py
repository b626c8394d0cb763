"""What a run says of its pace where nobody watches a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from spalign.report import progress
from spalign.report.progress import Progress


@pytest.mark.parametrize(
    ("total", "ticks", "told"),
    [
        (432, (1, 8), [False, True]),  # 2% of them
        (100_000, (1, 18, 1), [False, False, True]),  # or twenty
        (8, (1, 1), [True, True]),  # of a few every one counts
        (8, (0, 1), [False, True]),
    ],
)
def test_how_long_it_takes_is_said_when_it_is_known(
    total: int, ticks: tuple[int, ...], told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_EVERY", -1)
    said = io.StringIO()
    with Progress(Console(file=said, width=200)).stage("sample", total, "responses") as tick:
        for count in ticks:
            tick(count)
    lines = said.getvalue().splitlines()
    assert lines[0] == f"sample: {total} responses"
    assert [bool(re.search(r"responses, [\d.]+/s, \d+ s left$", line)) for line in lines[1:-1]] == told
    done = [sum(ticks[: i + 1]) for i in range(len(ticks))]
    assert [line.partition(" responses")[0] for line in lines[1:-1]] == [f"sample: {n}/{total}" for n in done]
