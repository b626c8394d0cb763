"""Judged evaluation: real answers of a small model, judges over sockets and in this process, Inspect's own logs; going on; mistakes."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'spalign[eval]'")

from inspect_ai.log import list_eval_logs, read_eval_log

from model_server import ModelServer, Scripted, status
from spalign.config import AssessConfig, EngineConfig
from spalign.constitution import load_constitution
from spalign.engines.make import identify
from spalign.errors import EngineError, PromptError
from spalign.pipeline.assess import assess
from spalign.pipeline.judging import asked_about
from spalign.selfeval import JudgeFile, Judgement, save_judge
from spalign.types import Message


def answer_of(text: str) -> str:
    return re.search(r"<answer(?:-a)?-\w+>\n(.*?)\n</answer", text, re.S)[1]  # type: ignore[index]


def grade(messages: tuple[Message, ...], _: int) -> str:
    """A judge by rules: the score is how many words there are, up to ten; of two answers the longer one wins."""
    text = messages[-1].content
    if "<answer" not in text:
        return "ready"
    first = answer_of(text)
    if "Verdict:" in text:
        other = re.search(r"<answer-b-\w+>\n(.*?)\n</answer", text, re.S)[1]  # type: ignore[index]
        return f"Verdict: {'A' if len(first) > len(other) else 'B'}"
    return "no idea" if "unreadable" in text else f"Words count. Score: {min(10, max(1, len(first.split())))}"


def config(folder: Path, tiny: Path, url: str, **more: Any) -> AssessConfig:
    rows = [{"id": f"p{i}", "prompt": f"question {i}", "intent": ("legitimate", "ill_meant")[i % 2]} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return AssessConfig.model_validate(
        {
            "name": "test",
            "models": {"vanilla": str(tiny), "other": str(tiny)},
            "judge": {"model": "openai-api/local/served", "base_url": url, "connections": 4},
            "prompts": {"source": str(folder / "prompts.jsonl")},
            "engine": {"dtype": "float32"},
            "answer": {"max_new_tokens": 12},
            "check": 4,
            "bootstrap": 200,
            "runs_dir": str(folder / "runs"),
            **more,
        }
    )


# streams of anyio that Inspect leaves to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_API_KEY", "sk-local-secret-value")
    yield
    gc.collect()  # here, not in another file's test


def test_a_served_judge_scores_compares_and_is_checked(tmp_path: Path, tiny_model: Path) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as server:
        found = assess(config(tmp_path, tiny_model, server.url, pairwise=True))
        asked = len(server.requests)
        # is it there; 6 answers x 2 objectives x 2 models; pairs of equal answers, of which nobody is asked; 4 x 2 to check the judge
        assert asked == 1 + 24 + 8
        again = assess(config(tmp_path, tiny_model, server.url, pairwise=True))
        assert len(server.requests) == asked  # nothing is asked twice
    assert again == found
    groups = [json.loads(line) for line in (tmp_path / "runs/test/vanilla/answers/part-00000.jsonl").read_text().splitlines()]
    words = [min(10, max(1, len(g["candidates"][0]["text"].split()))) for g in groups]
    assert found["scores"]["vanilla"]["harmlessness"]["all"]["mean"]["mean"] == pytest.approx(sum(words) / 6, abs=1e-4)
    assert found["scores"]["other"]["harmlessness"]["all"]["difference"]["mean"] == 0.0
    assert found["pairwise"]["other"]["harmlessness"]["all"]["tie"]["mean"] == 1.0
    assert [c["objective"] for c in found["judge"]["check"]] == ["harmlessness", "helpfulness"]
    table = (tmp_path / "runs/test/table.md").read_text()
    assert "Judge, harmlessness (asked, 1-10): AUC" in table
    assert "sk-local-secret-value" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "runs").rglob("*") if p.is_file())
    logs = list_eval_logs(str(tmp_path / "runs"))
    assert len(logs) == 5
    samples = [s for log in logs for s in read_eval_log(log).samples or []]
    assert {name for s in samples for name in s.scores or {}} == {"harmlessness", "helpfulness"}


def test_an_interrupted_judging_goes_on_where_it_was(tmp_path: Path, tiny_model: Path) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as server:
        settings = config(tmp_path, tiny_model, server.url, check=0, models={"vanilla": str(tiny_model)}, judge={
            "model": "openai-api/local/served", "base_url": server.url, "connections": 1})  # fmt: skip
        server.fault_if = lambda path, body: status(401, "no such key") if "question 4" in str(body) else None
        with pytest.raises(EngineError, match="judging stopped"):
            assess(settings)
        done = sum("question" in str(body) and "question 4" not in str(body) for _, _, body in server.requests)
        assert 0 < done <= 10
        server.fault_if = lambda path, body: None
        server.requests.clear()
        found = assess(settings)
        assert len(server.requests) == 12 - done
    assert found["scores"]["vanilla"]["helpfulness"]["all"]["prompts"] == 6


def test_what_cannot_be_read_is_unscored_and_counted(tmp_path: Path, tiny_model: Path) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as server:
        settings = config(tmp_path, tiny_model, server.url, check=0, suffix="unreadable")
        found = assess(settings)
    assert found["unscored"]["vanilla"] == {"harmlessness": 6, "helpfulness": 6}
    assert "harmlessness" not in found["scores"]["vanilla"] or not found["scores"]["vanilla"]["harmlessness"]
    assert "Unscored, and left out: vanilla: 6 harmlessness" in (tmp_path / "runs/test/table.md").read_text()


def test_a_judge_of_ours_and_utility(tmp_path: Path, tiny_model: Path) -> None:
    """The tiny model judges by yes/no; MMLU by lm-eval on a file; MT-Bench in two turns."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'spalign[eval]'")
    constitution = load_constitution("harmless_helpful")
    how = {
        o.name: Judgement.unchecked("yes_no").model_copy(update={"asked": asked_about(o), "threshold": 5.0})
        for o in constitution.objectives
    }
    fingerprint = identify(str(tiny_model), EngineConfig())
    save_judge(tmp_path / "judge.yaml", JudgeFile(model=str(tiny_model), fingerprint=fingerprint, rows="0" * 64, objectives=how))
    questions = [
        {"subject": f"s{i % 2}", "question": f"What is {i} + 1?", "choices": [str(i), str(i + 1), "x", "y"], "answer": "B"}
        for i in range(8)
    ]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    turns = [{"question_id": n, "category": "c", "turns": [f"Say {n}.", "Again."], "reference": ["a", "b"]} for n in range(3)]
    (tmp_path / "mt.jsonl").write_text("".join(json.dumps(t) + "\n" for t in turns))
    found = assess(
        config(
            tmp_path,
            tiny_model,
            "",
            judge={"model": f"spalign/{tiny_model}", "judge_file": str(tmp_path / "judge.yaml")},
            pairwise=True,
            mmlu={"source": str(tmp_path / "mmlu.jsonl")},
            mt_bench={"source": str(tmp_path / "mt.jsonl")},
        )
    )
    assert found["judge"]["scale"] == [0, 10]
    lines = (tmp_path / "runs/test/vanilla/answers/part-00000.jsonl").read_text().splitlines()
    answered = sum(bool(json.loads(line)["candidates"][0]["text"].strip()) for line in lines)
    assert found["scores"]["vanilla"]["harmlessness"]["all"]["prompts"] == answered
    assert found["unscored"]["vanilla"]["harmlessness"] == 6 - answered  # a blank answer has no score
    assert found["utility"]["vanilla"]["mmlu"]["questions"] == 8
    assert 0 <= found["utility"]["vanilla"]["mmlu"]["accuracy"]["mean"] <= 1
    assert found["utility"]["other"]["mmlu"]["difference"]["mean"] == 0.0
    assert found["utility"]["vanilla"]["mt_bench"]["questions"] == 3
    assert found["utility"]["other"]["mt_bench"]["difference"]["mean"] == 0.0
    second = json.loads((tmp_path / "runs/test/vanilla/mt-bench-2/part-00000.jsonl").read_text().splitlines()[0])
    assert [m["role"] for m in second["prompt"]["messages"]] == ["user", "assistant", "user"]


def test_prompts_that_were_trained_on_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(PromptError, match="is the held-out prompt"):
        assess(config(tmp_path, tiny_model, "http://localhost:9", trained_on=[{"source": str(tmp_path / "prompts.jsonl")}]))
    assert not (tmp_path / "runs").exists()


def test_a_judge_that_nobody_serves_is_an_error_before_any_model_answers(tmp_path: Path, tiny_model: Path) -> None:
    judge = {"model": "openai-api/local/served", "base_url": "http://127.0.0.1:9/v1", "max_retries": 1, "timeout": 5}
    with pytest.raises(EngineError, match="cannot be used"):
        assess(config(tmp_path, tiny_model, "", judge=judge))
    assert not list((tmp_path / "runs").rglob("part-*"))


def test_a_judge_behind_another_server_is_another_judge(tmp_path: Path, tiny_model: Path) -> None:
    with ModelServer(Scripted(grade), names=("served",)) as one:
        assess(config(tmp_path, tiny_model, one.url, check=0))
    with ModelServer(Scripted(lambda messages, seed: "Score: 3"), names=("served",)) as two:
        found = assess(config(tmp_path, tiny_model, two.url, check=0))
    assert found["scores"]["vanilla"]["harmlessness"]["all"]["mean"]["mean"] == 3.0
    assert found["judge"]["check"] == []
    assert "was not checked" in (tmp_path / "runs/test/table.md").read_text()


def test_a_model_that_runs_here_by_inspect_judges(tmp_path: Path, tiny_model: Path) -> None:
    """Random weights say nothing that can be read: all is unscored, none of it by default."""
    judge = {"model": "hf/local", "args": {"model_path": str(tiny_model), "device": "cpu"}, "max_tokens": 8}
    found = assess(config(tmp_path, tiny_model, "", judge=judge, check=0, models={"vanilla": str(tiny_model)}))
    assert found["unscored"]["vanilla"] == {"harmlessness": 6, "helpfulness": 6}


def test_mmlu_alone_needs_no_judge(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'spalign[eval]'")
    row = {"subject": "s", "question": "What is 1 + 1?\u2028", "choices": ["1", "2", "3", "4"], "answer": "B"}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    found = assess(config(tmp_path, tiny_model, "", judge=None, prompts=None, mmlu={"source": str(tmp_path / "mmlu.jsonl")}))
    assert found["utility"]["other"]["mmlu"]["questions"] == 1


def test_a_judge_that_inspect_does_not_know(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(EngineError, match="the judge 'nobody/x' cannot be used"):
        assess(config(tmp_path, tiny_model, "", judge={"model": "nobody/x"}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not valid JSON"),
        ('{"question_id": 1, "turns": ["one"]}', "not"),
        ("", "holds no rows"),
        ('{"question": 1}', "not a question of MT-Bench"),
        ('{"question_id": 1, "turns": [5, "b"]}', "not a question of MT-Bench"),
        ('{"question_id": 1, "turns": ["a", "b"]}\n{"question_id": 1, "turns": ["a", "b"]}', "stands there twice"),
    ],
)
def test_mistakes_in_the_questions_of_mt_bench(tmp_path: Path, tiny_model: Path, line: str, what: str) -> None:
    (tmp_path / "mt.jsonl").write_text(line)
    with pytest.raises(PromptError, match=what):
        assess(config(tmp_path, tiny_model, "http://localhost:9", mt_bench={"source": str(tmp_path / "mt.jsonl")}))
