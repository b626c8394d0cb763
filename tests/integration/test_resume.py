"""A real engine that is interrupted anywhere in a batch comes, with its journal, to the very completions of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from spalign.config import EngineConfig
from spalign.engines.base import Batching, Completion, GenerateRequest, Sampling
from spalign.engines.transformers import TransformersEngine
from spalign.pipeline.context import recorded
from spalign.store import Journal
from spalign.types import Message

HOW = Sampling(1.0, 0.95, 24)
REQUESTS = [
    GenerateRequest(f"r{i}", (Message("user", "why " * (1 + 3 * (i % 4)) + str(i)),), (100 * i, 100 * i + 1, 100 * i + 2), HOW)
    for i in range(6)
]


class Mortal:
    """The engine, until it has given so many completions."""

    name = "mortal"

    def __init__(self, engine: TransformersEngine, lives: int) -> None:
        self.engine, self.lives, self.batches = engine, lives, engine.batches
        self.asked = 0

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Completion]:
        self.asked += sum(len(r.seeds) for r in requests)
        for completion in self.engine.generate(requests):
            if not self.lives:
                raise KeyboardInterrupt
            self.lives -= 1
            yield completion


def by_place(completions: list[Completion]) -> dict[tuple[str, int], Completion]:
    assert len({(c.request_id, c.index) for c in completions}) == len(completions)
    return {(c.request_id, c.index): c for c in completions}


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_model: Path, tmp_path: Path, dtype: str):
    engine = TransformersEngine.load(str(tiny_model), EngineConfig(dtype=dtype, batch_size=4))  # type: ignore[arg-type]
    assert isinstance(engine, Batching)
    whole = by_place(list(engine.generate(REQUESTS)))
    for lives in (1, 2, 3, 4, 6, 9, 17):
        first, second = Mortal(engine, lives), Mortal(engine, 1000)
        journal = Journal(tmp_path / f"{dtype}-{lives}")
        with pytest.raises(KeyboardInterrupt):
            list(recorded(first, "m", REQUESTS, journal))
        journal.close()
        journal = Journal(journal.path)
        got = by_place(list(recorded(second, "m", REQUESTS, journal)))
        journal.close()
        assert got == whole
        # 18 completions in batches of 4, one after the other: those that were finished do not run again, and no line is written twice
        assert second.asked == 18 - 4 * (lives // 4)
        keys = [line.split(b'"')[3] for line in journal.path.read_bytes().split(b"\n")[:-1]]
        assert len(keys) == len(set(keys)) == 18


@pytest.mark.model
def test_a_batch_asked_for_alone_is_that_batch_again(tiny_model: Path):
    engine = TransformersEngine.load(str(tiny_model), EngineConfig(dtype="float32", batch_size=4))
    batches = engine.batches(REQUESTS)
    assert [len(b) for b in batches] == [4, 4, 4, 4, 2]
    assert sorted((r.id, i) for b in batches for r, i in b) == sorted((r.id, i) for r in REQUESTS for i in range(3))
