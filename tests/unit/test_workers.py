"""Processes that share tasks: results come in order, errors are raised as they are, and no process stays."""

from __future__ import annotations

import os
import time
from functools import partial
from operator import floordiv, mul

import psutil
import pytest

from spalign.errors import SpalignError
from spalign.pipeline.workers import in_order


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "spalign.pipeline.workers" in " ".join(c.cmdline())]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 25])
def test_results_come_in_the_order_of_the_tasks(processes, count):
    assert list(in_order(partial(mul, 3), list(range(count)), processes)) == [3 * n for n in range(count)]
    assert children() == []


def test_results_that_exceed_a_pipe_block_nobody():
    big = [bytes([n]) * 3_000_000 for n in range(12)]
    assert [len(r) for r in in_order(partial(mul, 2), big, 2)] == [6_000_000] * 12


def test_a_task_that_fails_raises_what_it_raised_after_the_results_before_it():
    got = []
    with pytest.raises(ZeroDivisionError):
        got.extend(in_order(partial(floordiv, 6), [1, 2, 0, 3], 2))  # what came before the error is in
    assert got == [6, 3]
    assert children() == []


def test_who_stops_early_leaves_no_process():
    results = in_order(time.sleep, [0.0, 60.0, 60.0, 60.0], 2)
    next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 30
    assert children() == []


def test_a_worker_that_ends_is_told():
    with pytest.raises(SpalignError, match="a worker process ended with code 9\n  fix: was it killed for its memory"):
        list(in_order(os._exit, [9, 9, 9], 2))
    assert children() == []
