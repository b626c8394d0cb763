"""The pipeline in one process. A scripted engine decides what is answered and how it scores; training runs the real tiny model.

A prompt's text names its kind; candidate i is drawn under the system prompt "variant i"; the refined one under "good". An answer
carries its scores: "alpha=2 beta=3 ..." scores 2.0 and 3.0.
"""

from __future__ import annotations

import json
import math
import re
import resource
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from plain_objectives import plain_objectives

from spalign.config import RunConfig, config_from
from spalign.engines.make import MERGED, adapter_of
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import NothingToTrainOn, PromptError, RunFolderError
from spalign.pipeline import STAGES, run, train
from spalign.store import RunFolder, Stage
from spalign.training import guard
from spalign.types import Message

OBJECTIVES = ("alpha", "beta", "gamma")

# kind -> scores of the four candidates, and of the refined response, on alpha and beta; None cannot be parsed
Scores = tuple[float | None, ...]
KINDS: dict[str, tuple[list[Scores], Scores]] = {
    # det(Sigma), ddof 1: alpha 2 4 3 5 and beta 3 2 5 4 have variance 5/3 each and covariance 0: 25/9
    "keep": ([(2, 3), (4, 2), (3, 5), (5, 4)], (8, 8)),
    "unscored": ([(2, 3), (4, 2), (3, 5), (5, 4)], (None, 8)),
    # alpha 10 4 3 5, deviations 4.5 -1.5 -2.5 -.5: 9 det = 29 * 5 - 4^2 = 129, but nothing is above 10
    "ceiling": ([(10, 3), (4, 2), (3, 5), (5, 4)], (10, 8)),
    "not dominating": ([(2, 3), (4, 2), (3, 5), (5, 4)], (8, 1)),
    "uninformative": ([(3, 3)] * 4, (8, 8)),
    # alpha .5 9 .5 9 and beta .5 .5 9 9: variance 4 * 4.25^2 / 3 = 24.1 each, covariance 0: det = 580
    "unstable": ([(0.5, 0.5), (9, 0.5), (0.5, 9), (9, 9)], (9.5, 9.5)),
    # all within 0.4 points of each other, summed over both
    "below margin": ([(3, 3), (3.1, 3), (3, 3.1), (3.1, 3.1)], (3.2, 3.2)),
    "empty": ([(2, 3), (4, 2), (3, 5), (5, 4)], (8, 8)),
    "truncated": ([(2, 3), (4, 2), (3, 5), (5, 4)], (8, 8)),
}


def reply(messages: tuple[Message, ...], seed: int) -> str:
    system = messages[0].content if messages[0].role == "system" else ""
    text = messages[-1].content
    if "Rate how well the assistant's answer" in text:  # likert: the integer below the score
        objective = re.search(r"Principle \((\w+)\)", text)[1]  # type: ignore[index]
        said = re.search(rf"Assistant: .*?{objective}=([\d.]+)", text)
        return str(max(1, int(float(said[1])))) if said else "none"
    kind = re.search(r"kind:([a-z ]+)", text)[1].strip()  # type: ignore[index]
    candidates, refined = KINDS[kind]
    good = "good" in system or text.startswith("Principles")
    if good and kind == "empty":
        return ""
    number = int(re.search(r"variant (\d)", system)[1]) if "variant" in system else 0  # type: ignore[index]
    scores = refined if good else candidates[number]
    third = (9.5 if good else (sum(s or 0 for s in scores) + number**2) / 2,)
    words = " ".join(f"{o}={s:g}" for o, s in zip(OBJECTIVES, (*scores, *third), strict=True) if s is not None)
    return words + (" and on and on" * 9 if good and kind == "truncated" else f" {'good' if good else number} {kind}")


def score(text: str, choice: str) -> float:
    """log p(Yes) - log p(No) = log(s / (10 - s)), so that the score is s; NaN where the answer has no such number."""
    if choice != " Yes":
        return 0.0
    case = text.rsplit("\nAssistant: ", 1)[1]
    objective = re.search(r"Question: Is (\w+) good", case)[1]  # type: ignore[index]
    said = re.search(rf"{objective}=([\d.]+)", case)
    if not said:
        return math.nan
    s = float(said[1])
    return 60.0 if s >= 10 else math.log(s / (10 - s))


def engine(_: str = "") -> ScriptedEngine:
    return ScriptedEngine(reply, score)


def constitution(folder: Path, k: int) -> str:
    path = folder / f"constitution-{k}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "test",
                "objectives": plain_objectives(OBJECTIVES[:k]),
                "system_variants": [{"name": f"v{i}", "text": f"variant {i}"} for i in range(4)],
                "refine_instruction": "Write a better answer.",
            }
        )
    )
    return str(path)


def prompts(folder: Path, name: str, kinds: Sequence[str]) -> dict[str, str]:
    rows = [{"id": f"{name}-{i}", "prompt": f"{name} {i} kind:{kind}", "intent": "legitimate"} for i, kind in enumerate(kinds)]
    return rows_file(folder, name, rows)


def rows_file(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"source": str(path)}


def settings(folder: Path, model: object, kinds: Sequence[str], k: int = 2, **changes: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "test",
        "model": str(model),
        "constitution": constitution(folder, k),
        "runs_dir": str(folder / "runs"),
        "shard_size": 2,
        "prompts": {"train": prompts(folder, "train", kinds), "heldout": prompts(folder, "heldout", ["keep"] * 2)},
        "engine": {"dtype": "float32"},
        "sample": {"n": 4, "max_new_tokens": 60},
        "self_evaluation": {"scorer": "yes_no"},
        "denoise": {"consistency": "strict", "tau": 50},
        "pairs": {"delta": 0.5, "max_per_prompt": None, "balance_length": False},
        "train": {"epochs": 2, "prompts_per_step": 4, "guard": {"prompts": 1, "max_length_ratio": 50, "max_repetition_rise": 1}},
        "evaluation": {"samples": 1, "bootstrap": 100},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
    return config_from(data)


def data_stages(config: RunConfig) -> Path:
    """Stages 1 to 5 only: nothing is trained."""
    for name in STAGES[:-1]:
        run(config, only=name, make_engine=engine)
    return config.folder / "iteration-1"


def manifest(stage: Path) -> dict[str, Any]:
    return json.loads((stage / "manifest.json").read_text())  # type: ignore[no-any-return]


def rows(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(stage.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def test_every_reason_is_counted_and_the_funnel_adds_up(tmp_path, tiny_model):
    kinds = [*KINDS, "ceiling", "keep"]
    base = data_stages(settings(tmp_path, tiny_model, kinds))
    funnel = manifest(base / "5-pair")["funnel"]
    once = {reason: 1 for reason in KINDS if reason not in ("keep", "ceiling")}
    assert funnel["dropped"] == {**once, "ceiling": 2}
    assert (funnel["prompts"], funnel["kept"]) == (11, 2)
    assert funnel["prompts"] == funnel["kept"] + sum(funnel["dropped"].values())
    # five responses a kept prompt, all different on alpha: 10 pairs each, of which alpha decides all
    assert (funnel["pairs"], funnel["decided_by"]) == (20, {"alpha": 20})
    assert funnel["responses"] == {"candidates": 44, "unfinished": 0, "empty": 0}
    verdicts = {r["prompt_id"]: r["reason"] for r in rows(base / "4-denoise")}
    expected = {f"train-{i}": None if kind in ("keep", "below margin") else kind for i, kind in enumerate(kinds)}
    assert verdicts == expected
    assert {r["prompt_id"] for r in rows(base / "5-pair")} == {"train-0", "train-10"}


def test_margins_gaps_and_weights_by_hand(tmp_path, tiny_model):
    base = data_stages(settings(tmp_path, tiny_model, ["keep"]))
    by_id = {r["id"]: r for r in rows(base / "5-pair")}
    # (5, 4) over (3, 5): |5-3| + |4-5| = 3, |(5+4) - (3+5)| = 1
    row = by_id["train-0/1-candidate-3>train-0/1-candidate-2"]
    assert (row["margin"], row["gap"]) == (pytest.approx(3), pytest.approx(1))
    assert row["scores_chosen"] == {"alpha": pytest.approx(5), "beta": pytest.approx(4)}
    # sums of scores: 16 (refined), 5, 6, 8, 9. Gaps of the ten pairs: 11 10 8 7, 1 3 4, 2 3, 1; their mean is 5
    assert row["weight"] == pytest.approx(1 / 5)
    assert sum(r["weight"] for r in by_id.values()) == pytest.approx(10)


def test_what_was_generated_is_what_is_trained_on(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["keep", "unscored", "keep"])
    base = data_stages(config)
    generated = {r["id"]: r for row in rows(base / "1-sample") for r in row["candidates"]}
    generated |= {r["id"]: r for row in rows(base / "3-refine") for r in row["refined"]}
    pairs = rows(base / "5-pair")
    assert len(pairs) == 20
    for row in pairs:
        for side, response_id in zip(("chosen", "rejected"), row["id"].split(">"), strict=True):
            assert row[f"{side}_ids"] == generated[response_id]["token_ids"]
            assert row[side] == [{"role": "assistant", "content": generated[response_id]["text"]}]
        number = row["prompt_id"].removeprefix("train-")
        bare = (Message("user", f"train {number} kind:keep"),)
        assert row["prompt"] == [{"role": "user", "content": bare[0].content}]
        assert row["prompt_ids"] == engine().encode_chat(bare)  # under no system prompt, whatever the answer was sampled under


def test_rows_load_as_a_data_set_with_the_columns_of_trl(tmp_path, tiny_model):
    from datasets import Dataset

    base = data_stages(settings(tmp_path, tiny_model, ["keep"]))
    data = Dataset.from_list(rows(base / "5-pair"))
    assert {"prompt", "chosen", "rejected"} <= set(data.column_names)
    first = data[0]
    assert [first[c][-1]["role"] for c in ("prompt", "chosen", "rejected")] == ["user", "assistant", "assistant"]
    assert len(data) == len(set(data["id"])) == 10


def test_the_order_of_prompts_does_not_change_the_pairs(tmp_path, tiny_model):
    kinds = ["keep", "unstable", "keep", "ceiling", "keep"]
    limits = {"max_per_prompt": 3, "balance_length": True}
    found = []
    for name, step in (("forward", 1), ("backward", -1)):
        folder = tmp_path / name
        folder.mkdir()
        made = [{"id": f"p{i}", "prompt": f"train {i} kind:{kind}"} for i, kind in enumerate(kinds)]
        config = settings(
            folder,
            tiny_model,
            kinds,
            pairs=limits,
            prompts={"train": rows_file(folder, "own", made[::step])},
        )
        found.append({r["id"]: r for r in rows(data_stages(config) / "5-pair")})
    assert found[0] == found[1]
    assert {r["prompt_id"] for r in found[0].values()} == {"p0", "p2", "p4"}


@pytest.mark.parametrize("size", [1, 3, 32])
def test_the_size_of_a_part_does_not_change_the_pairs(tmp_path, tiny_model, size):
    kinds = ["keep", "unstable", "keep", "ceiling", "keep"]
    one = data_stages(settings(tmp_path, tiny_model, kinds))
    other = data_stages(settings(tmp_path, tiny_model, kinds, name="other", shard_size=size))
    assert rows(one / "5-pair") == rows(other / "5-pair")
    assert len(list((other / "1-sample").glob("part-*"))) == math.ceil(5 / size)


@pytest.mark.parametrize("k", [1, 3])
def test_any_number_of_objectives(tmp_path, tiny_model, k):
    base = data_stages(settings(tmp_path, tiny_model, ["keep", "keep"], k=k))
    denoised = rows(base / "4-denoise")
    # k = 1: the variance of 2 4 3 5 is 5/3. k = 3: gamma is (alpha + beta + i^2) / 2, that is 2.5 3.5 6 9, with mean 5.25.
    # Deviations: alpha -1.5 .5 -.5 1.5, beta -.5 -1.5 1.5 .5, gamma -2.75 -1.75 .75 3.75. Sums of products: 5 for alpha and beta with
    # themselves, 25.25 for gamma; 0 for alpha and beta, 8.5 for alpha and gamma, 7 for beta and gamma; divided by 3 for ddof 1:
    # 27 det = 5 * 5 * 25.25 - 5 * 8.5^2 - 5 * 7^2 = 25
    expected = {1: 5 / 3, 3: 25 / 27}[k]
    assert [r["det"] for r in denoised] == [pytest.approx(expected)] * 2
    funnel = manifest(base / "5-pair")["funnel"]
    assert (funnel["kept"], funnel["pairs"], funnel["decided_by"]) == (2, 20, {"alpha": 20})
    row = next(r for r in rows(base / "5-pair") if r["id"] == "train-0/1-candidate-3>train-0/1-candidate-0")
    # 5 - 2, 4 - 3 and 9 - 2.5
    assert row["margin"] == pytest.approx({1: 3, 3: 10.5}[k])
    assert set(row["scores_chosen"]) == set(OBJECTIVES[:k])


def test_a_whole_run_trains_evaluates_and_measures_the_other_recipe(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["keep", "ceiling", "keep", "not dominating"], compare=["paper"])
    outcome = run(config, make_engine=engine)
    assert outcome.new
    summary = outcome.summary
    assert summary is not None
    assert summary == json.loads((config.folder / "summary.json").read_text())
    assert summary["funnel"]["kept"] == 2
    training = summary["iterations"][0]["training"]
    assert (training["steps"], training["prompts"]) == (2, 2)
    assert (Path(summary["model_path"]) / "model.safetensors").exists()
    paper = summary["recipes"]["paper"]
    # the paper's recipe asks for integers; its refined answer is (8, 8), above every candidate of "keep"; "ceiling" and
    # "not dominating" leave here too
    assert paper["funnel"]["prompts"] == 4
    assert paper["funnel"]["dropped"] == {"ceiling": 1, "not dominating": 1}
    assert paper["consistency"]["refined"] == {"passed": 2, "tested": 4}
    assert not (config.folder / "iteration-1/compare-paper/1-sample").exists()
    assert not (config.folder / "iteration-1/compare-paper/6-train").exists()
    found = {str(p.relative_to(config.folder)): p.stat().st_mtime_ns for p in config.folder.rglob("manifest.json")}
    again = run(config, make_engine=lambda _: pytest.fail("nothing is loaded for a run that is done"))
    assert not again.new
    assert again.summary == summary
    assert found == {str(p.relative_to(config.folder)): p.stat().st_mtime_ns for p in config.folder.rglob("manifest.json")}


@pytest.mark.parametrize("new_prompts", [False, True])
def test_a_second_iteration_starts_from_the_trained_model(tmp_path, tiny_model, new_prompts):
    loaded = []

    def make(name: str) -> ScriptedEngine:
        loaded.append(name)
        return engine()

    config = settings(tmp_path, tiny_model, ["keep"] * 4, iterations=2, new_prompts=new_prompts)
    summary = run(config, make_engine=make).summary
    assert summary is not None
    trained = [str(config.folder / f"iteration-{i}/6-train/model") for i in (1, 2)]
    assert list(dict.fromkeys(loaded)) == [str(tiny_model), *trained]
    assert summary["model_path"] == trained[1]
    asked = [[r["prompt"]["id"] for r in rows(config.folder / f"iteration-{i}/1-sample")] for i in (1, 2)]
    everything = [f"train-{i}" for i in range(4)]
    if new_prompts:
        assert asked == [everything[0::2], everything[1::2]]
    else:
        assert asked == [everything, everything]
    assert [i["funnel"]["prompts"] for i in summary["iterations"]] == [len(a) for a in asked]
    ids = [{r["id"] for r in rows(config.folder / f"iteration-{i}/5-pair")} for i in (1, 2)]
    assert not ids[0] & ids[1]
    first, second = (config.folder / f"iteration-{i}/6-train/model/model.safetensors" for i in (1, 2))
    assert first.read_bytes() != second.read_bytes()


def test_nothing_survives(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["uninformative", "uninformative", "ceiling"])
    with pytest.raises(NothingToTrainOn) as e:
        run(config, make_engine=engine)
    assert e.value.exit_code == 3
    assert "no preference pair is left" in e.value.message
    assert e.value.hint.startswith("2 of 3 prompts left as 'uninformative': ")
    assert not (config.folder / "iteration-1/6-train").exists()
    assert not (config.folder / "summary.json").exists()
    assert manifest(config.folder / "iteration-1/5-pair")["funnel"]["pairs"] == 0


def test_lora_hands_over_an_adapter_and_a_merged_model_that_say_the_same(tmp_path, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    full = settings(tmp_path, tiny_model, ["keep"] * 2).model_dump()
    config = config_from(full, ("train.lora={r: 4}", "train.learning_rate=0.001", "train.guard.max_kl=9"))  # as --set gives them
    summary = run(config, make_engine=engine).summary
    assert summary is not None
    assert summary["iterations"][0]["training"]["collapsed"] is None
    stage = config.folder / "iteration-1/6-train"
    files = {p.name for p in (stage / "adapter").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors", MERGED}
    assert adapter_of(str(stage / "model")) == (str(tiny_model), stage / "adapter")
    assert json.loads((stage / "adapter/adapter_config.json").read_text())["r"] == 4
    base, merged = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in (tiny_model, stage / "model"))
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        untrained, whole = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, stage / "adapter").eval()(ids).logits
    torch.testing.assert_close(whole, adapted, rtol=0, atol=1e-4)
    assert float((adapted - untrained).abs().max()) > 0.1  # it learned something, or all would be equal


def test_training_that_is_stopped_and_goes_on_keeps_its_seconds_and_its_probes(tmp_path, tiny_model, monkeypatch):
    often = {"every_steps": 1, "prompts": 1, "max_length_ratio": 50, "max_repetition_rise": 1}
    config = settings(tmp_path, tiny_model, ["keep"] * 2, train={"epochs": 3, "guard": often})  # three steps
    stage = data_stages(config).joinpath("6-train")
    verdicts = iter([None])
    monkeypatch.setattr(guard, "collapse", lambda *_: next(verdicts))  # nothing is left to say of step 2
    with pytest.raises(StopIteration):
        run(config, make_engine=engine)
    monkeypatch.undo()
    noted = json.loads((stage / "progress.json").read_text())["seconds"]
    assert noted > 0
    run(config, make_engine=engine)
    assert manifest(stage)["seconds"] > noted
    log = json.loads((stage / "log.json").read_text())
    assert [s["step"] for s in log["steps"]] == [p["step"] for p in log["guard"]["probes"]] == [1, 2, 3]
    assert not (stage / "checkpoints").exists()


def test_training_that_is_over_is_not_done_again_for_want_of_a_manifest(tmp_path, tiny_model, monkeypatch):
    config = settings(tmp_path, tiny_model, ["keep"] * 2)
    stage = data_stages(config).joinpath("6-train")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, make_engine=engine)
    monkeypatch.undo()
    assert not (stage / "checkpoints").exists()
    (stage / "checkpoints/checkpoint-2").mkdir(parents=True)  # as if the kill had come before the clean-up
    monkeypatch.setattr(train, "train_job", killed)
    run(config, make_engine=engine)
    assert manifest(stage)["steps"] == manifest(stage)["steps_kept"] == 2
    assert not (stage / "checkpoints").exists()


def test_a_changed_threshold_does_the_scores_not_again(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["keep", "keep"])
    base = data_stages(config)
    before = {s: (base / s / "manifest.json").stat().st_mtime_ns for s in ("1-sample", "2-evaluate", "3-refine")}
    changed = settings(tmp_path, tiny_model, ["keep", "keep"], self_evaluation={"thresholds": {"alpha": 4.5}})
    for name in STAGES[:-1]:
        run(changed, only=name, mode="resume", make_engine=engine)
    assert before == {s: (base / s / "manifest.json").stat().st_mtime_ns for s in before}
    # alpha is met from 4.5 on: the refined (8, 8) and candidate (5, 4) tie on alpha and beta decides between them
    assert manifest(base / "5-pair")["funnel"]["decided_by"] == {"alpha": 18, "beta": 2}


def test_a_held_out_prompt_that_leaves_no_room_is_refused_before_anything_is_sampled(tmp_path, tiny_model):
    heldout = rows_file(tmp_path, "long", [{"id": "long one", "prompt": "word " * 3000 + "kind:keep"}])
    config = settings(tmp_path, tiny_model, ["keep"], prompts={"heldout": heldout})
    with pytest.raises(PromptError, match=r"prompt 'long one' has .* exceeds the model's window of 4096"):
        run(config, only="sample", make_engine=lambda _: ScriptedEngine(reply, score, window=4096))
    assert not list(config.folder.rglob("part-*"))


def test_how_engines_are_run_alike_and_where_the_folder_lies_is_no_other_configuration(tmp_path, tiny_model):
    judge_engine = {"dtype": "float32"}
    config = settings(tmp_path, tiny_model, ["keep"], self_evaluation={"judge_engine": judge_engine})
    run(config, only="sample", make_engine=engine)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    same = (
        "engine.batch_size=3",
        "engine.timeout=1",
        "engine.batching=static",
        "self_evaluation.judge_engine.max_retries=1",
        f"runs_dir={tmp_path}/link",
    )
    found = run(config_from(config.model_dump(mode="json"), same), only="sample", make_engine=lambda _: pytest.fail("done already"))
    assert not found.new
    for other in (
        "engine.dtype=bfloat16",
        "engine.hidden_states=true",
        "self_evaluation.judge_engine.device=cuda",
        "engine.batching=continuous",
    ):
        more = ("engine.kind=vllm",) if "hidden" in other else ()
        with pytest.raises(RunFolderError, match="holds a run with another configuration") as e:
            run(config_from(config.model_dump(mode="json"), (other, *more)), only="sample", make_engine=engine)
        option, _, value = other.partition("=")
        assert f"+{option}: {value.replace('true', 'True')}" in e.value.message


def test_fresh_keeps_the_lock_until_the_new_folder_has_one(tmp_path, tiny_model, monkeypatch):
    """Another process that comes at any moment is kept out, or has the new folder to itself."""
    config = settings(tmp_path, tiny_model, ["keep"])
    run(config, only="sample", make_engine=engine)
    seen = []
    aside = RunFolder.set_aside

    def slow(folder: RunFolder) -> Path:
        with pytest.raises(RunFolderError, match="is working on this run"):
            RunFolder(config.folder).open()
        found = aside(folder)
        with pytest.raises(RunFolderError, match="is working on this run"):
            RunFolder(found).open()
        seen.append(found)
        return found

    monkeypatch.setattr(RunFolder, "set_aside", slow)
    assert run(config, mode="fresh", only="sample", make_engine=engine).new
    RunFolder(seen[0]).open()


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["of the weights", "of the optimiser"])
def test_a_checkpoint_that_does_not_fit_ends_training_with_what_to_do(tmp_path, tiny_model, share):
    config = settings(tmp_path, tiny_model, ["keep"] * 2)
    data_stages(config)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int(share * (tiny_model / "model.safetensors").stat().st_size)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(RunFolderError, match=r"6-train: (File too large|cannot be written; is the disk full.*)\n  fix: "):
            run(config, only="train", make_engine=engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert run(config, only="train", make_engine=engine).new


# -- what is lost and made again --------------------------------------------------------------------------------------


def test_what_follows_on_a_part_that_was_made_again_is_done_again_only_where_the_part_is_another(tmp_path, tiny_model):
    """A damaged part is removed, as the error says. An engine that repeats itself gives it back; another one does not."""
    loose = {"prompts": 1, "max_length_ratio": 50, "max_repetition_rise": 1, "max_kl": 1e9, "max_chosen_drop": 1e9}
    config = settings(tmp_path, tiny_model, ["keep"] * 3, shard_size=1, train={"guard": loose})
    first = run(config, make_engine=engine).summary
    assert first is not None
    sampled, folder = config.folder / "iteration-1/1-sample", config.folder

    def again(make: Any) -> Any:
        for name in ("part-00001.jsonl", "manifest.json"):
            (sampled / name).unlink()
        return run(config, make_engine=make)

    def times() -> dict[str, int]:
        files = [*folder.rglob("part-*.jsonl"), *folder.rglob("manifest.json")]
        return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files if ".replaced-" not in str(f)}

    before = times()
    same = again(engine)
    assert same.new
    part = ("part-00001.jsonl", "manifest.json")
    assert {f for f, at in times().items() if at != before[f]} == {f"iteration-1/1-sample/{f}" for f in part}
    assert all(same.summary[name] == first[name] for name in ("gate", "measures", "prompts"))

    def other(messages: tuple[Message, ...], seed: int) -> str:
        return reply(messages, seed).replace("2 keep", "2 keeps")

    before = times()
    changed = again(lambda _="": ScriptedEngine(other, score))
    now = times()
    redone = {f for f, at in now.items() if at != before.get(f)}
    parts = {f"iteration-1/{stage}/{f}" for stage in ("1-sample", "2-evaluate", "3-refine") for f in part}
    assert {f for f in redone if "iteration-1/" in f and f.split("/")[1][0] in "123"} == parts
    assert {f"iteration-1/{stage}/manifest.json" for stage in ("4-denoise", "5-pair", "6-train")} <= redone
    held_out = {f for f in redone if f.startswith("evaluation/")}  # the new model is asked; its answers, scripted, are those of the old one
    assert held_out == {f"evaluation/after/1-sample/{f}" for f in ("part-00000.jsonl", "part-00001.jsonl", "manifest.json")}
    assert (folder / "iteration-1/6-train.replaced-1/model").is_dir()
    assert (folder / "iteration-1/2-evaluate/replaced-1.part-00001.jsonl").exists()
    assert changed.summary["digest"] != first["digest"]
    assert not run(config, make_engine=engine).new
