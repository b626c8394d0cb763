"""`spalign run` with policy and judge on a server that wants a key: the whole way, and where the key is afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_server import ModelServer, Real
from spalign.config import EngineConfig
from spalign.engines.transformers import TransformersEngine

SECRET = "sk-a-very-secret-key-0123456789"


@pytest.fixture
def server(tiny_model, environment):
    own = TransformersEngine.load(str(tiny_model), EngineConfig(dtype="float32"))
    environment["MY_SERVER_KEY"] = SECRET
    with ModelServer(Real(own, always=(" Yes", " No")), names=("served",), window=own.window, key=SECRET) as running:
        yield running
    del environment["MY_SERVER_KEY"]


def engine(server: ModelServer, tokenizer: Path | None) -> dict[str, object]:
    own = {"kind": "openai", "base_url": server.url, "api_key_env": "MY_SERVER_KEY", "max_retries": 1}
    return {**own, "tokenizer": str(tokenizer)} if tokenizer else own


def holding(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_served_policy_samples_and_judges_itself_and_is_trained_here(spalign, lay_out, server, tiny_model, tmp_path):
    lay_out(tmp_path, model="served", engine=engine(server, tiny_model))
    done = spalign(tmp_path, "run", "run.yaml")
    assert done.code == 0, done.err
    assert len(server.asked("/chat/completions")) >= 12 * 4
    assert (tmp_path / "runs/tiny/iteration-1/6-train/model/model.safetensors").exists()
    assert SECRET not in done.out + done.err
    assert holding(tmp_path) == []
    again = spalign(tmp_path, "run", "run.yaml")  # all is done: the server is not asked
    assert again.code == 0, again.err


def test_a_served_judge_of_a_policy_that_runs_here(spalign, lay_out, server, tmp_path):
    lay_out(tmp_path, self_evaluation={"judge": "served", "judge_engine": engine(server, None)})
    done = spalign(tmp_path, "evaluate", "run.yaml")
    assert done.code == 2  # stages before it first
    for stage in ("sample", "evaluate"):
        done = spalign(tmp_path, stage, "run.yaml")
        assert done.code == 0, done.err
    parts = sorted((tmp_path / "runs/tiny/iteration-1/2-evaluate").glob("part-*.jsonl"))
    scored = [json.loads(line) for p in parts for line in p.read_text().splitlines()]
    candidates = [r for g in scored for r in g["candidates"] if r["finished"]]
    assert sum(set(r["scores"]) == {"harmlessness", "helpfulness"} for r in candidates) > len(candidates) / 2
    assert SECRET not in done.out + done.err
    assert holding(tmp_path) == []


def test_a_server_that_goes_away_stops_the_run_and_the_same_command_goes_on(spalign, lay_out, server, tiny_model, tmp_path):
    lay_out(tmp_path, model="served", engine=engine(server, tiny_model))
    server.fault_if = lambda path, body: (lambda handler, _: handler.error(503, "gone")) if len(server.requests) > 40 else None
    stopped = spalign(tmp_path, "sample", "run.yaml")
    assert stopped.code == 2
    assert "failed (503), tried 2 times" in stopped.err
    assert "the same command goes on" in stopped.err
    parts = {p.name: p.read_bytes() for p in tmp_path.rglob("1-sample/part-*.jsonl")}
    assert parts
    server.fault_if = lambda path, body: None
    done = spalign(tmp_path, "sample", "run.yaml")
    assert done.code == 0, done.err
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("1-sample/part-*.jsonl")}.items() >= parts.items()


def test_a_policy_that_is_only_served_cannot_be_trained_and_the_run_says_so_first(spalign, lay_out, server, tmp_path):
    lay_out(tmp_path, model="served", engine=engine(server, None))
    done = spalign(tmp_path, "run", "run.yaml")
    assert done.code == 2
    assert "needs its weights here" in done.err
    assert server.asked("/chat/completions") == []


def test_judge_check_of_a_served_model_without_its_key(spalign, server, environment, tmp_path):
    del environment["MY_SERVER_KEY"]
    done = spalign(tmp_path, "judge-check", "--model", "served", "--base-url", server.url)
    environment["MY_SERVER_KEY"] = SECRET
    assert done.code == 2
    assert "wants a key, and there is none in OPENAI_API_KEY" in done.err
