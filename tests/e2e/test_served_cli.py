"""`spalign run` with policy and judge on a server that wants a key: the whole way, and where the key is afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model_server import ModelServer, Real, Scripted, status
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


def test_a_run_with_a_served_judge_scores_as_the_same_model_does_here(spalign, lay_out, server, environment, reference, tmp_path):
    lay_out(tmp_path, self_evaluation={"judge": "served", "judge_engine": engine(server, None)})
    done = spalign(tmp_path, "evaluate", "run.yaml")
    assert done.code == 2  # stages before it first
    environment["OPENAI_LOG"] = "debug"  # the client's own log of what it sends
    done = spalign(tmp_path, "run", "run.yaml")
    del environment["OPENAI_LOG"]
    assert done.code == 0, done.err
    assert "Sending HTTP Request" in done.err
    assert SECRET not in done.out + done.err
    assert holding(tmp_path) == []
    assert "MY_SERVER_KEY" in (tmp_path / "runs/tiny/config.yaml").read_text()
    assert server.asked("/chat/completions"), "the first question; the scores are read off plain completions"
    assert len(server.asked("/v1/completions")) > 2 * 12 * 4
    here, served = scores(reference.run), scores(tmp_path / "runs/tiny")
    assert len(served) == 12 * 4
    assert served.keys() == here.keys()
    for name, found in served.items():
        assert found == pytest.approx(here[name], abs=1e-3)
    assert len({v["helpfulness"] for v in served.values() if v}) > 10, "scores that differ, so that pairs could be made"


def scores(run: Path) -> dict[str, dict[str, float]]:
    """Candidate -> its scores, as the run's self-evaluation left them."""
    parts = sorted((run / "iteration-1/2-evaluate").glob("part-*.jsonl"))
    groups = [json.loads(line) for p in parts for line in p.read_text().splitlines()]
    return {r["id"]: r["scores"] for g in groups for r in g["candidates"]}


def served_by(server: ModelServer) -> dict[str, object]:
    return {"judge": "served", "judge_engine": {"kind": "openai", "base_url": server.url}}


@pytest.mark.parametrize("scorer", ["yes_no", "auto"])
def test_a_judge_without_log_probabilities_is_refused_before_anything_is_sampled_and_likert_is_named(spalign, lay_out, tmp_path, scorer):
    with ModelServer(Scripted(lambda messages, seed: "7"), names=("served",)) as wordy:
        lay_out(tmp_path, self_evaluation={**served_by(wordy), "scorer": scorer})
        done = spalign(tmp_path, "run", "run.yaml")
        assert done.code == 2
        assert "likert" in done.err
        assert "log-probabilities" in done.err or "choice_logprobs" in done.err
        assert list(tmp_path.rglob("part-*.jsonl")) == []


def test_with_likert_it_judges(spalign, lay_out, tmp_path):
    with ModelServer(Scripted(lambda messages, seed: "7"), names=("served",)) as wordy:
        lay_out(tmp_path, self_evaluation={**served_by(wordy), "scorer": "likert"})
        for stage in ("sample", "evaluate"):
            done = spalign(tmp_path, stage, "run.yaml")
            assert done.code == 0, done.err
        found = [v for v in scores(tmp_path / "runs/tiny").values() if v]
        assert found
        assert all(set(v) == {"harmlessness", "helpfulness"} and len(set(v.values())) == 1 for v in found)


def test_judge_check_measures_a_served_model(spalign, server, environment, tmp_path):
    rows = [f"question {i},this is {kind} {i},helpfulness,{label}" for i in range(6) for kind, label in (("kind", 1), ("cruel", 0))]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,response,objective,label", *rows]) + "\n")
    environment["OPENAI_API_KEY"] = SECRET
    which = ("--data", "rows.csv", "--objective", "helpfulness", "--scorer", "yes_no")
    done = spalign(tmp_path, "judge-check", "--model", "served", "--base-url", server.url, *which, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out.splitlines()[-1])["objectives"]["helpfulness"]["yes_no"]["rows"] == 12
    assert SECRET not in done.out + done.err
    assert holding(tmp_path) == []
    del environment["OPENAI_API_KEY"]


def test_a_server_that_goes_away_stops_the_run_and_the_same_command_goes_on(spalign, lay_out, server, tiny_model, tmp_path):
    lay_out(tmp_path, model="served", engine=engine(server, tiny_model))
    gone = status(503, "gone")  # only to every other one, so that of some prompt some answers are there
    server.fault_if = lambda path, body: gone if len(server.requests) > 20 and body.get("seed", 0) % 2 else None
    stopped = spalign(tmp_path, "sample", "run.yaml")
    assert stopped.code == 2
    assert "failed (503), tried 2 times" in stopped.err
    assert "the same command goes on" in stopped.err
    parts = {p.name: p.read_bytes() for p in tmp_path.rglob("1-sample/part-*.jsonl")}
    assert parts
    journals = [line for p in tmp_path.rglob("1-sample/journal-*.jsonl") for line in p.read_text().splitlines()]
    assert journals
    server.fault_if, before = lambda path, body: None, len(server.asked())
    done = spalign(tmp_path, "sample", "run.yaml")
    assert done.code == 0, done.err
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("1-sample/part-*.jsonl")}.items() >= parts.items()
    rows = [line for part in parts.values() for line in part.splitlines()]
    asked = [body for body in server.asked()[before:] if "seed" in body and "logprobs" not in body]  # the first questions have both
    assert len(asked) == (12 - len(rows)) * 4 - len(journals), "what is there is not asked for again"


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
