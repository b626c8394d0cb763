"""The judge in a run: what `scorer: auto` finds out, what it stops, what is not measured twice. Scripted models, real files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from plain_objectives import plain_objectives

from spalign.config import RunConfig, config_from
from spalign.constitution import load_constitution
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import ConfigError, PromptError, WeakJudge
from spalign.pipeline import run
from spalign.pipeline.judging import asked_about
from spalign.pipeline.run import agree
from spalign.selfeval import JudgeFile, Judgement, load_judge, save_judge
from spalign.types import Message

OBJECTIVES = ("alpha", "beta")


def reply(messages: tuple[Message, ...], seed: int) -> str:
    """Answers that name their own quality; those under the good system prompt are good."""
    good = "good" in messages[0].content
    number = 9 if good else seed % 7 + 1
    return f"alpha={number} beta={number if good else (seed // 7) % 7 + 1}"


def sees(text: str, choice: str) -> float:
    """A judge that reads the quality: log-odds 0 at 5."""
    if choice.strip() != "Yes":
        return 0.0
    case = text.rsplit("Assistant: ", 1)[1]
    objective = re.search(r"Is (\w+) good", case)[1]  # type: ignore[index]
    said = re.search(rf"{objective}=([\d.]+)", case)
    return float(said[1]) - 5 if said else 0.0


def guesses(text: str, choice: str) -> float:
    """A judge that looks at anything but the quality."""
    return float(sum(map(ord, re.sub(r"\d", "", text))) % 97) / 97 if choice.strip() == "Yes" else 0.0


def constitution(folder: Path, threshold: object = "auto") -> str:
    objectives = [{**o, "threshold": threshold if o["name"] == "alpha" else None} for o in plain_objectives(OBJECTIVES)]
    path = folder / "constitution.yaml"
    path.write_text(yaml.safe_dump({"name": "test", "objectives": objectives, "refine_instruction": "Write a better answer."}))
    return str(path)


def labelled(folder: Path, objectives: Sequence[str] = OBJECTIVES) -> str:
    """Sixty answers an objective; people call those from 6 on good."""
    rows = [
        {"prompt": f"question {i}", "response": f"alpha={i % 10} beta={i % 10}", "objective": o, "label": int(i % 10 >= 6)}
        for o in objectives
        for i in range(60)
    ]
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def settings(folder: Path, model: object, **own: Any) -> RunConfig:
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(4)))
    return config_from(
        {
            "name": "test",
            "model": str(model),
            "constitution": constitution(folder),
            "runs_dir": str(folder / "runs"),
            "prompts": {w: {"source": str(folder / f"{w}.jsonl")} for w in ("train", "heldout")},
            "engine": {"dtype": "float32"},
            "sample": {"n": 4, "max_new_tokens": 60},
            "self_evaluation": own if "labelled" in own else {"labelled": labelled(folder), **own},
        }
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setenv("SPALIGN_CACHE", str(tmp_path / "cache"))


def judge_rows(config: RunConfig, at: str = "iteration-1/0-judge") -> dict[str, dict[str, Any]]:
    lines = (config.folder / at / "part-00000.jsonl").read_text().splitlines()
    return {row["objective"]: row for row in map(json.loads, lines)}


def scored(config: RunConfig, at: str = "iteration-1/2-evaluate") -> list[dict[str, Any]]:
    return [json.loads(line)["candidates"] for p in sorted((config.folder / at).glob("part-*")) for line in p.read_text().splitlines()]


def stages(config: RunConfig, engine: ScriptedEngine, *names: str, mode: Any = "auto") -> None:
    for name in names:
        run(config, only=name, mode=mode, make_engine=lambda _: engine)


def test_auto_takes_the_scorer_that_sees_and_puts_the_threshold_where_people_do(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model)
    stages(config, ScriptedEngine(reply, sees), "judge", "sample", "evaluate", "refine", "denoise", "pair")
    found = judge_rows(config)
    assert set(found) == set(OBJECTIVES)
    how = Judgement.model_validate(found["alpha"]["judgement"])
    assert how.auc == 1.0
    assert how.verdict == "trustworthy"
    assert how.scorer in ("yes_no", "yes_no_zero", "ensemble")
    for candidates in scored(config):
        for c in candidates:
            quality = int(re.search(r"alpha=(\d)", c["text"])[1])  # type: ignore[index]
            # people's labels change between 5 and 6, and so does "met"
            assert (c["scores"]["alpha"] >= how.threshold) == (quality >= 6)
            assert c["spreads"]["alpha"] > 0


def test_a_judge_that_guesses_stops_the_run_before_anything_is_sampled(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model)
    with pytest.raises(WeakJudge) as e:
        run(config, make_engine=lambda _: ScriptedEngine(reply, guesses))
    assert e.value.exit_code == 3
    assert "AUC on labelled answers" in e.value.message or "no scorer" in e.value.message
    assert "--allow-weak-judge" in e.value.hint or "larger model" in e.value.hint
    assert not list(config.folder.rglob("1-sample/part-*"))


def test_leave_to_go_on_with_a_weak_judge_needs_no_resume(tmp_path, tiny_model):
    def noisy(text: str, choice: str) -> float:  # the quality and, as large, something of the question: above chance, too weak to rely on
        question = text.rsplit("User: ", 1)[1].split("Assistant: ", maxsplit=1)[0]
        return sees(text, choice) + 25 * (sum(map(ord, question)) * 7919 % 13) / 13 if choice.strip() == "Yes" else 0.0

    with pytest.raises(WeakJudge):
        stages(settings(tmp_path, tiny_model), ScriptedEngine(reply, noisy), "judge", "sample")
    allowed = settings(tmp_path, tiny_model, allow_weak_judge=True)
    for row in judge_rows(allowed).values():
        assert 0.5 < row["judgement"]["auc"] < 0.8
    stages(allowed, ScriptedEngine(reply, noisy), "sample", "evaluate")
    assert all("alpha" in c["scores"] for candidates in scored(allowed) for c in candidates if c["finished"])


def test_the_check_is_not_done_twice_for_one_model(tmp_path, tiny_model, monkeypatch):
    asked = []

    def counting(text: str, choice: str) -> float:
        asked.append(text)
        return sees(text, choice)

    # as if it were the model's own engine: an engine of the caller's has no part in the shared checks
    monkeypatch.setattr("spalign.pipeline.prepare.load_engine", lambda name, config: ScriptedEngine(reply, counting))
    first = settings(tmp_path, tiny_model)
    run(first, only="judge")
    assert asked
    asked.clear()
    second = first.model_copy(update={"name": "second"})
    run(second, only="judge")
    assert not asked
    assert judge_rows(first) == judge_rows(second)
    third = first.model_copy(update={"name": "third"})
    run(third, only="judge", make_engine=lambda _: ScriptedEngine(reply, counting))
    assert asked
    (cached,) = (tmp_path / "cache/judge").iterdir()
    cached.write_text('{"rows": [{"objective": "alpha"}]}')
    asked.clear()
    run(first.model_copy(update={"name": "fourth"}), only="judge")
    assert asked, "a damaged cache is measured anew"


def test_a_threshold_auto_calibrates_a_named_scorer(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, scorer="yes_no")
    stages(config, ScriptedEngine(reply, sees), "judge")
    found = judge_rows(config)
    assert set(found) == {"alpha"}, "beta has a named scorer and no threshold: nothing to find out"
    assert found["alpha"]["judgement"]["scorer"] == "yes_no"


def test_a_judge_file_takes_the_place_of_the_check(tmp_path, tiny_model):
    from spalign.engines.models import fingerprint

    path = tmp_path / "judge.yaml"
    config = settings(tmp_path, tiny_model, judge_file=str(path))
    how = {
        o.name: Judgement(scorer="yes_no", threshold=7.5, auc=0.9, auc_ci=(0.8, 1.0), asked=asked_about(o))
        for o in load_constitution(config.constitution).objectives
    }
    file = JudgeFile(model="m", fingerprint=fingerprint(str(tiny_model)), rows="-", objectives=how)
    save_judge(path, file)
    assert load_judge(path) == file
    stages(config, ScriptedEngine(reply, sees), "sample", "evaluate")
    assert not (config.folder / "iteration-1/0-judge").exists()
    before = (config.folder / "iteration-1/2-evaluate/manifest.json").stat().st_mtime_ns

    def refused(match: str, **changes: Any) -> None:
        save_judge(path, file.model_copy(update=changes))
        with pytest.raises(ConfigError, match=match):
            run(config, make_engine=lambda _: ScriptedEngine(reply, sees))

    def alpha(**changes: Any) -> dict[str, Judgement]:
        return {**how, "alpha": how["alpha"].model_copy(update=changes)}

    refused("made for the model 'm'", fingerprint="another")
    refused("says nothing about objective 'beta'", objectives={"alpha": how["alpha"]})
    refused("asked about in other words", objectives=alpha(asked="other words"))
    refused("no threshold for 'alpha'", objectives=alpha(threshold=None))
    save_judge(path, file.model_copy(update={"objectives": alpha(threshold=3.0)}))
    stages(config, ScriptedEngine(reply, sees), "evaluate", "refine", "denoise", "pair")
    assert (config.folder / "iteration-1/2-evaluate/manifest.json").stat().st_mtime_ns == before, "the scores do not depend on it"
    assert json.loads((config.folder / "iteration-1/5-pair/manifest.json").read_text())["inputs"]["levels"][0] == ["alpha", 3.0, None]


def test_an_objective_without_labelled_answers_is_refused_at_once(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, labelled=labelled(tmp_path, ["alpha"]))
    with pytest.raises(PromptError, match="objective 'beta' has 0 good and 0 bad"):
        run(config, make_engine=lambda _: ScriptedEngine(reply, sees))
    assert not config.folder.exists()


def test_a_reference_judge_scores_the_same_candidates_and_is_compared(tmp_path, tiny_model):
    itself = settings(tmp_path, tiny_model, reference_judge=str(tiny_model))
    with pytest.raises(ConfigError, match="is the judge itself, and would agree with itself\n  fix: name another model"):
        agree(itself, make_engine=lambda _: ScriptedEngine(reply, sees))
    with pytest.raises(ConfigError, match="reference_scorer is for a reference judge, and there is none"):
        agree(settings(tmp_path, tiny_model, reference_scorer="yes_no"), make_engine=lambda _: ScriptedEngine(reply, sees))
    config = settings(tmp_path, tiny_model, scorer="yes_no", reference_judge=str(tiny_model), reference_scorer="yes_no_zero")
    found = agree(config, make_engine=lambda _: ScriptedEngine(reply, sees))
    assert found["reference"] == str(tiny_model)
    assert not (config.folder / "iteration-1/3-refine").exists(), "only what it takes"
    mine, theirs = (scored(config, f"iteration-1/{w}2-evaluate") for w in ("", "reference/"))
    assert [[c["id"] for c in g] for g in mine] == [[c["id"] for c in g] for g in theirs]
    assert {r["judgement"]["scorer"] for r in judge_rows(config, "iteration-1/reference/0-judge").values()} == {"yes_no_zero"}
