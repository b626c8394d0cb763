"""`spalign experiment` in one process: arms on the same data, soups, a judge over sockets, the table; a second run does nothing."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'spalign[eval]'")

from safetensors.torch import load_file
from test_pipeline import engine, settings

from model_server import ModelServer, Scripted
from spalign.config import ExperimentConfig, load_experiment
from spalign.pipeline.experiment import experiment
from spalign.types import Message

ARMS = ["vanilla", "sft", "spa-dpo", "spa", "no-denoising", "weighted-sum", "self-criticism", "soup-6:4"]


def grade(messages: tuple[Message, ...], _: int) -> str:
    if "Principle" not in messages[-1].content:
        return "ready"
    objective = re.search(r"Principle \((\w+)\)", messages[-1].content)[1]  # type: ignore[index]
    said = re.search(rf"<answer-\w+>\n.*?{objective}=(\d+)", messages[-1].content, re.S)
    return f"Score: {said[1]}" if said else "none"


# streams of anyio that Inspect leaves to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()  # here, not in another file's test


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.setenv("LOCAL_API_KEY", "x")
    run = settings(tmp_path, tiny_model, ["keep", "keep", "not dominating"]).model_dump(exclude_unset=True, mode="json")
    heldout = run["prompts"].pop("heldout")
    train = run["prompts"].pop("train")
    for fixed in ("name", "runs_dir", "model", "evaluation"):
        run.pop(fixed)
    return ExperimentConfig.model_validate(
        {
            "title": "test",
            "policies": {"tiny": {"model": str(tiny_model)}},
            "data": {"own": {"set": {"prompts": {"train": train}}, "evaluate": {"heldout": heldout}}},
            "arms": ARMS,
            "own_arms": {name: arm.model_dump(exclude_none=True) for name, arm in load_experiment("table1").own_arms.items()},
            "seeds": [0, 1],
            "run": run,
            "judge": {"model": "openai-api/local/served", "base_url": "http://localhost:9"},
            "answer": {"max_new_tokens": 60},
            "bootstrap": 100,
            "paper": {"tiny": {"spa": {"heldout": [9.9, 7.1]}}},
            "runs_dir": str(tmp_path / "experiment"),
        }
    )


def test_every_arm_is_trained_on_the_same_data_and_judged(config: ExperimentConfig, tmp_path: Path) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as server:
        assert config.judge is not None
        judge = config.judge.model_copy(update={"base_url": server.url})
        config = config.model_copy(update={"judge": judge})
        found = experiment(config, "own", make_engine=engine)
        asked = len(server.requests)
        files = {p: p.stat().st_mtime_ns for p in (tmp_path / "experiment").rglob("*.safetensors")}
        assert experiment(config, "own", make_engine=engine) == found
        assert len(server.requests) == asked + 1  # whether it is there
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "experiment").rglob("*.safetensors")} == files

    assert not found["failed"]
    figures = found["results"]["tiny"]["own"]["on-heldout"]
    assert list(figures["models"]) == ARMS
    assert figures["seeds"] == 2
    cell = tmp_path / "experiment/tiny.own.seed0"

    def inode(arm: str, stage: str) -> int:
        return (cell / arm / "iteration-1" / stage / "part-00000.jsonl").stat().st_ino

    for arm in ("sft", "spa-dpo", "weighted-sum", "primary-only"):
        assert inode(arm, "1-sample") == inode("spa", "1-sample")
        assert inode(arm, "3-refine") == inode("spa", "3-refine")
    assert inode("self-criticism", "2-evaluate") == inode("spa", "2-evaluate")
    assert inode("self-criticism", "3-refine") != inode("spa", "3-refine")

    def kept(arm: str) -> int:
        funnel = json.loads((cell / arm / "iteration-1/5-pair/manifest.json").read_text())["funnel"]
        return int(funnel["kept"])

    assert (kept("spa"), kept("no-denoising")) == (2, 3)
    first, second, mixed = (
        load_file(cell / name / "model.safetensors")
        for name in ("primary-only/iteration-1/6-train/model", "secondary-only/iteration-1/6-train/model", "soup-6-4")
    )
    name = next(n for n in mixed if not first[n].equal(second[n]))
    assert float((mixed[name] - (0.6 * first[name] + 0.4 * second[name])).abs().max()) < 1e-6
    table = (tmp_path / "experiment/own.md").read_text()
    assert "| spa | " in table
    assert "| 9.9 | 7.1 |" in table


def test_an_arm_that_keeps_no_pair_has_no_row_and_says_why(config: ExperimentConfig) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as server:
        assert config.judge is not None
        changes = {
            "judge": config.judge.model_copy(update={"base_url": server.url}),
            "arms": ("vanilla", "hopeless"),
            "own_arms": {**config.own_arms, "hopeless": config.own_arms["spa"].model_copy(update={"set": {"pairs": {"delta": 50}}})},
            "seeds": (0,),
        }
        found = experiment(config.model_copy(update=changes), "own", make_engine=engine)
    assert list(found["failed"]) == ["tiny, own, seed 0, hopeless"]
    assert list(found["results"]["tiny"]["own"]["on-heldout"]["models"]) == ["vanilla"]
