"""`spalign judge-check` from outside: its JSON, its file, its mistakes, and a run that a weak judge stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers that differ in a word, for a model of random weights to read."""
    path = tmp_path_factory.mktemp("labelled") / "rows.csv"
    lines = ["prompt,response,objective,label"]
    for i in range(24):
        lines += [f"question {i},this is kind {i},harmlessness,1", f"question {i},this is cruel {i},harmlessness,0"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_ends_with_the_documented_line_and_a_run_takes_the_file(
    spalign: Callable[..., Any], tiny_model: Path, labelled: Path, tmp_path: Path, lay_out: Callable[..., Path]
) -> None:
    out = tmp_path / "made" / "judge.yaml"
    args = ("--model", str(tiny_model), "--data", str(labelled), "--objective", "harmlessness", "--out", str(out), "--json")
    done = spalign(tmp_path, "judge-check", *args, "--scorer", "probe", "--scorer", "contrastive", "--scorer", "ensemble")
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    report = found["objectives"]["harmlessness"]["probe"]
    assert report["rows"] == 48
    assert report["auc_ci"][0] <= report["auc"] <= report["auc_ci"][1]
    assert report["auc"] > 0.9, "one word tells them apart, and even random weights pass it on"
    assert found["recommended"] == {"harmlessness": "probe"} or "ensemble" in found["recommended"].values()
    assert "counts as good from" in done.out
    assert yaml.safe_load(out.read_text())["objectives"]["harmlessness"]["threshold"] == pytest.approx(found["thresholds"]["harmlessness"])
    again = spalign(tmp_path, "judge-check", *args, "--scorer", "probe", "--scorer", "contrastive", "--scorer", "ensemble")
    same = json.loads(again.out.splitlines()[-1])["objectives"]["harmlessness"]["probe"]
    assert {k: v for k, v in same.items() if k != "seconds_per_100"} == {k: v for k, v in report.items() if k != "seconds_per_100"}
    assert out.with_name("judge.yaml.old").exists(), "what was there is kept"
    lay_out(tmp_path, self_evaluation={"judge_file": str(out), "scorer": {"harmlessness": "auto", "helpfulness": "yes_no"}})
    sampled = spalign(tmp_path, "sample", "run.yaml")
    assert sampled.code == 0, sampled.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--scorer", "guess"), "no scorer 'guess'"),
        (("--objective", "kindness"), "no objective 'kindness'"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--bad-recall", "2"), "bad_recall 2.0 is not between 0 and 1"),
        (("--out", "/proc/judge.yaml"), "/proc/judge.yaml: cannot be written"),
        (("--scorer", "ensemble"), "an ensemble needs two other scorers"),
        (("--constitution", "nobody"), "no constitution 'nobody'"),
    ],
)
def test_mistakes_are_named_before_any_model_is_loaded(
    spalign: Callable[..., Any], tiny_model: Path, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    done = spalign(tmp_path, "judge-check", "--model", str(tiny_model), *args)
    assert done.code == 2
    assert says in done.err
    assert "fix: " in done.err


def test_rows_with_mistakes_are_all_named(spalign: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "p", "response": "", "objective": "harmlessness", "label": 1}\n{"prompt": 3}\nnot json\n'
    )
    done = spalign(tmp_path, "judge-check", "--model", str(tiny_model), "--data", "rows.jsonl")
    assert done.code == 2
    for line in ("rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"):
        assert line in done.err


def test_a_run_stops_with_three_where_the_judge_guesses(spalign: Callable[..., Any], lay_out: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q {i}", "response": f"answer {i * 7919 % 101}", "objective": o, "label": i % 2}
        for i in range(24)
        for o in ("harmlessness", "helpfulness")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lay_out(tmp_path, self_evaluation={"scorer": "auto", "labelled": "rows.jsonl"})
    done = spalign(tmp_path, "run", "run.yaml")
    assert done.code == 3, done.out + done.err
    assert "stopped: " in done.err
    assert "larger model" in done.err
    assert not list(tmp_path.rglob("1-sample/part-*"))
