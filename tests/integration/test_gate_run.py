"""The priority gate in a run: what is handed over, under which name, and what a second run does.

Scripted engines decide how a model's held-out answers score, by its folder's name; training and checkpoints are the real tiny model's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file
from test_pipeline import reply, score, settings

from spalign.config import RunConfig, config_from
from spalign.engines.scripted import ScriptedEngine
from spalign.errors import PriorityLost, RunFolderError
from spalign.pipeline import STAGES, Outcome, run
from spalign.pipeline.checkpoints import keep_weights, kept_checkpoints
from spalign.report import Progress, print_summary
from spalign.store import Stage
from spalign.types import Message

Level = float | Sequence[float]
STAGE = Path("runs/test/iteration-1/6-train")
OFTEN = {"every_steps": 1, "prompts": 1, "max_length_ratio": 50, "max_repetition_rise": 1, "max_kl": 99, "max_chosen_drop": 99}
# before: 6. Three steps, a checkpoint after each; checkpoint-3 is `model`
LOST = {"model": 3.0, "checkpoint-2": 5.0, "checkpoint-1": 4.0}
SAVED = {"model": 3.0, "checkpoint-2": 5.0, "checkpoint-1": 6.0}


class Models:
    """Makes engines whose held-out answers have the alpha that `levels` gives the model, one for all prompts or one a prompt; else 6.

    A level is for a model of any iteration, or for that of `iteration-N/`.
    """

    def __init__(self, levels: dict[str, Level]) -> None:
        self.levels, self.loaded = levels, []

    def __call__(self, name: str) -> ScriptedEngine:
        short = Path(name).name.replace("model-checkpoint", "checkpoint")
        self.loaded.append(short)
        level = self.levels.get(f"{Path(name).parent.parent.name}/{short}", self.levels.get(short, 6.0))

        def answer(messages: tuple[Message, ...], seed: int) -> str:
            text = messages[-1].content
            if not text.startswith("heldout"):
                return reply(messages, seed)
            alpha = level if isinstance(level, float) else level[int(text.split()[1])]
            return f"alpha={alpha:g} beta=5 gamma=5"

        return ScriptedEngine(answer, score)


def configured(model: Path, folder: Path = Path(), **changes: Any) -> RunConfig:
    return settings(folder, model, ["keep"] * 2, **{"train": {"epochs": 3, "guard": OFTEN}, **changes})


def loses(config: RunConfig, models: Callable[[str], Any], **options: Any) -> PriorityLost:
    with pytest.raises(PriorityLost) as e:
        run(config, make_engine=models, **options)
    assert e.value.exit_code == 4
    return e.value


def summary() -> dict[str, Any]:
    return json.loads(Path("runs/test/summary.json").read_text())  # type: ignore[no-any-return]


def names(folder: Path = STAGE) -> set[str]:
    """What training hands over or keeps."""
    return {p.name for p in folder.iterdir() if p.is_dir()}


def manifests() -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in Path("runs").rglob("manifest.json")}


@pytest.fixture(scope="module")
def once_trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained, not evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        for name in STAGES:
            run(configured(tiny_model), only=name, make_engine=Models({}))
    return folder


@pytest.fixture(scope="module")
def once_failed(once_trained: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, which then lost, and of whose checkpoints none passes."""
    folder = Path(shutil.copytree(once_trained, tmp_path_factory.mktemp("failed") / "here"))
    with contextlib.chdir(folder):
        loses(configured(tiny_model), Models(LOST))
    return folder


@pytest.fixture
def trained(once_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it to work on, as the current folder: all paths in it are relative."""
    monkeypatch.chdir(shutil.copytree(once_trained, tmp_path / "here"))


@pytest.fixture
def failed(once_failed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(once_failed, tmp_path / "here"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(summary: dict[str, Any]) -> str:
    console = Console(width=250, record=True, quiet=False, file=Path(os.devnull).open("w"))  # noqa: SIM115
    print_summary(summary, console)
    console.file.close()
    return console.export_text()


# a model that lost


def test_a_model_that_lost_is_not_handed_over_and_a_second_run_says_the_same(failed, tiny_model):
    s = summary()
    assert s["model_path"] is None
    assert names() == {"model-failed-gate", "kept"}
    assert {p.name for p in (STAGE / "kept").iterdir()} == {"checkpoint-1", "checkpoint-2"}
    assert not list(STAGE.rglob("optimizer*"))
    g = s["gate"]
    # every answer 6 before and 3 after; checkpoints from newest to oldest: 5 and 4 after
    assert (g["objective"], g["enforced"], g["passed"], g["verdict"]) == ("alpha", True, False, "lost")
    assert (g["difference"], g["lower"], g["margin"], g["confidence"]) == (pytest.approx(-3), pytest.approx(-3), 0.5, 0.95)
    assert (g["prompts"], g["unscored"], g["proposed"]) == (2, 0, None)
    assert [(c["step"], c["verdict"], c["difference"]) for c in g["checkpoints"]] == [
        (2, "lost", pytest.approx(-1)),
        (1, "lost", pytest.approx(-2)),
    ]
    assert Path(g["failed_path"]) == STAGE / "model-failed-gate"
    assert {c["name"]: c["passed"] for c in s["checks"]}["primary holds"] is False

    before, written = manifests(), Path("runs/test/summary.json").read_bytes()
    ui = Progress(Console(width=250, record=True, file=Path(os.devnull).open("w")))  # noqa: SIM115
    again = loses(configured(tiny_model), lambda _: pytest.fail("nothing is loaded for a run that is done"), ui=ui)
    ui.console.file.close()
    assert manifests() == before
    assert Path("runs/test/summary.json").read_bytes() == written
    assert names() == {"model-failed-gate", "kept"}
    assert again.message.startswith(
        "the trained model lost its primary objective: alpha -3.00, one-sided 95% lower bound -3.00 on 2 prompts"
    )
    assert f"kept as {STAGE / 'model-failed-gate'}; none of 2 earlier checkpoints of the last iteration passes" in again.message
    assert "smaller train.learning_rate" in again.hint
    out = ui.console.export_text()
    assert "PRIORITY GATE FAILED (lost): alpha -3.00" in out
    assert "  checkpoint 1: lost; alpha -2.00" in out
    assert f"no model is handed over; the one that failed is kept: {STAGE / 'model-failed-gate'}\n" in out
    assert "\nmodel: " not in out


def test_the_last_checkpoint_that_passes_is_proposed_and_loads(trained, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = Models(SAVED)
    e = loses(configured(tiny_model), models)
    s = summary()
    proposed = STAGE / "model-checkpoint-1"
    assert (s["model_path"], s["gate"]["proposed"]) == (None, {"iteration": 1, "step": 1, "path": str(proposed)})
    assert [c["passed"] for c in s["gate"]["checkpoints"]] == [False, True]
    assert f"checkpoint 1 passes and is proposed instead: {proposed}" in e.message
    assert f"proposed, checkpoint 1: {proposed}\n" in shown(s)
    assert names() == {"model-failed-gate", "model-checkpoint-1", "kept"}
    mine, kept, last = (load_file(f / "model.safetensors") for f in (proposed, STAGE / "kept/checkpoint-1", STAGE / "model-failed-gate"))
    assert all(mine[k].equal(kept[k]) for k in kept)
    assert not all(mine[k].equal(last[k]) for k in last)
    assert AutoModelForCausalLM.from_pretrained(proposed).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(proposed).chat_template
    loses(configured(tiny_model), lambda _: pytest.fail("nothing is loaded for a run that is done"))
    assert summary() == s


def test_a_gate_of_an_earlier_version_which_noted_no_iteration_says_the_same(trained, tiny_model):
    loses(configured(tiny_model), Models(SAVED))
    s, path = summary(), Path("runs/test/evaluation/gate/manifest.json")
    old = json.loads(path.read_text())
    old["gate"] |= {"proposed": 1, "checkpoints": [{k: v for k, v in c.items() if k != "iteration"} for c in old["gate"]["checkpoints"]]}
    path.write_text(json.dumps(old))
    Path("runs/test/summary.json").unlink()
    loses(configured(tiny_model), lambda _: pytest.fail("nothing is loaded for a run that is done"))
    again = summary()["gate"]
    assert again["proposed"] == s["gate"]["proposed"]
    assert shown({**s, "gate": again}) == shown(s)


def test_older_checkpoints_are_not_asked_once_one_passes(trained, tiny_model):
    models = Models({**SAVED, "checkpoint-2": 5.8})
    loses(configured(tiny_model), models)
    assert summary()["gate"]["proposed"]["step"] == 2
    assert "checkpoint-1" not in models.loaded
    assert names() == {"model-failed-gate", "model-checkpoint-2", "kept"}


def test_what_cannot_be_shown_does_not_pass_and_the_message_says_what_would_help(trained, tiny_model):
    # differences -2 and +1.6: the mean -0.2 is above -0.5, but one resample in four has mean -2
    wide = (4.0, 7.6)
    e = loses(configured(tiny_model), Models({"model": wide, "checkpoint-2": wide, "checkpoint-1": wide}))
    g = summary()["gate"]
    assert (g["verdict"], g["difference"], g["lower"]) == ("not shown", pytest.approx(-0.2), pytest.approx(-2))
    assert "it is not shown that the trained model's primary objective holds: alpha -0.20" in e.message
    assert "none of 2 earlier checkpoints of the last iteration passes" in e.message
    # width 1.8, room 0.3: 36 times two prompts, and one more
    assert "more held-out prompts (about 73 would do if the difference stays)" in e.hint
    assert "smaller train.learning_rate" in e.hint


def test_scores_that_lack_are_no_pass(trained, tiny_model):
    def numberless(name: str) -> ScriptedEngine:
        blank = "6-train" in name
        return ScriptedEngine(lambda m, _: "nothing" if blank else "alpha=6 beta=5 gamma=5", score)

    e = loses(configured(tiny_model), numberless)
    g = summary()["gate"]
    assert (g["verdict"], g["difference"], g["lower"], g["prompts"], g["unscored"]) == ("not shown", None, None, 0, 2)
    assert "see why the judge cannot score 'alpha'" in e.hint
    assert "alpha not scored before and after on any prompt" in shown(summary())


# a model that holds, and a gate that is off


def test_a_model_that_holds_is_handed_over_and_its_checkpoints_go(trained, tiny_model):
    outcome = run(configured(tiny_model), make_engine=Models({"model": 5.75}))
    s = outcome.summary
    assert s is not None
    assert s["model_path"] == str(STAGE / "model")
    assert (s["gate"]["passed"], s["gate"]["checkpoints"], s["gate"]["failed_path"]) == (True, [], None)
    assert names() == {"model"}
    assert "priority gate passed: alpha -0.25, one-sided 95% lower bound -0.25 on 2 prompts" in shown(s)
    assert f"model: {STAGE / 'model'}\n" in shown(s)


def test_a_gate_that_is_off_hands_over_and_says_so(here, tiny_model):
    config = configured(tiny_model, evaluation={"samples": 1, "bootstrap": 100, "gate": {"enabled": False}})
    s = run(config, make_engine=Models(LOST)).summary
    assert s is not None
    assert s["model_path"] == str(STAGE / "model")
    assert (s["gate"]["enforced"], s["gate"]["passed"], s["gate"]["verdict"], s["gate"]["checkpoints"]) == (False, False, "lost", [])
    assert names() == {"model"}
    assert "PRIORITY GATE FAILED (lost)" in shown(s)
    assert "handed over all the same" in shown(s)


# going on


@pytest.mark.parametrize("where", ["sampling a checkpoint", "before the manifest"])
def test_interrupted_it_goes_on(trained, tiny_model, monkeypatch, where):
    models = Models(SAVED)

    def interrupted(name: str) -> ScriptedEngine:
        if "checkpoint-1" in name:
            raise KeyboardInterrupt
        return models(name)

    late = where == "before the manifest"
    finish = Stage.finish

    def killed(stage: Stage, **facts: Any) -> dict[str, Any]:
        if stage.name == "gate":
            raise KeyboardInterrupt
        return finish(stage, **facts)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        if late:
            m.setattr(Stage, "finish", killed)
        run(configured(tiny_model), make_engine=models if late else interrupted)
    assert not Path("runs/test/summary.json").exists()
    assert ("model-failed-gate" in names()) == late
    before = manifests()
    models.loaded.clear()
    loses(configured(tiny_model), models)
    assert before.items() <= manifests().items(), "what was done was done again"
    assert "checkpoint-2" not in models.loaded
    assert summary()["gate"]["proposed"]["step"] == 1
    assert names() == {"model-failed-gate", "model-checkpoint-1", "kept"}


def resumed(model: Path, models: Models, **changes: Any) -> Outcome:
    return run(configured(model, **changes), mode="resume", make_engine=models)


def evaluation(**gate: Any) -> dict[str, Any]:
    return {"samples": 1, "bootstrap": 100, "gate": gate}


def test_another_margin_decides_anew_on_the_same_answers(failed, tiny_model):
    models = Models(LOST)
    # a margin of 1.5: checkpoint-2 lost 1
    loses(configured(tiny_model, evaluation=evaluation(margin=1.5)), models, mode="resume")
    assert summary()["gate"]["proposed"]["step"] == 2
    assert names() == {"model-failed-gate", "model-checkpoint-2", "kept"}
    # a margin of 4: the model lost 3
    outcome = resumed(tiny_model, models, evaluation=evaluation(margin=4))
    assert outcome.summary is not None
    assert outcome.summary["model_path"] == str(STAGE / "model")
    assert names() == {"model", "model-checkpoint-2"}
    # and back: now nothing is kept
    e = loses(configured(tiny_model, evaluation=evaluation(margin=0.5)), models, mode="resume")
    assert "no earlier checkpoint of the last iteration was kept" in e.message
    assert names() == {"model-failed-gate", "model-checkpoint-2"}
    assert models.loaded == [], "everything was answered and judged before"


def test_other_held_out_answers_are_those_of_the_model_that_failed(failed, tiny_model):
    models = Models(LOST)
    loses(configured(tiny_model, evaluation={"samples": 2, "bootstrap": 100}), models, mode="resume")
    assert {"model", "checkpoint-2", "checkpoint-1"} <= set(models.loaded)
    assert names() == {"model-failed-gate", "kept"}


def test_trained_anew_the_model_that_failed_is_set_aside_under_its_name(failed, tiny_model):
    outcome = resumed(tiny_model, Models({}), train={"epochs": 3, "guard": OFTEN, "learning_rate": 1e-7})
    assert outcome.summary is not None
    assert outcome.summary["model_path"] == str(STAGE / "model")
    assert names() == {"model"}
    assert names(STAGE.with_name("6-train.replaced-1")) == {"model-failed-gate", "kept"}


def test_fresh_does_not_look_for_what_is_set_aside(failed, tiny_model):
    assert run(configured(tiny_model), mode="fresh", make_engine=Models({})).new
    assert names() == {"model"}


def test_another_iteration_starts_from_the_model_and_the_gate_is_for_the_last(failed, tiny_model):
    models = Models({})
    outcome = resumed(tiny_model, models, iterations=2)
    assert outcome.summary is not None
    second = Path("runs/test/iteration-2/6-train")
    assert outcome.summary["model_path"] == str(second / "model")
    assert names() == names(second) == {"model"}


# iterations before the last


FIRST, SECOND = STAGE, Path("runs/test/iteration-2/6-train")


@pytest.fixture(scope="module")
def once_trained_twice(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations that has been trained, not evaluated."""
    folder = tmp_path_factory.mktemp("twice")
    with contextlib.chdir(folder):
        run(configured(tiny_model, iterations=2), until="train", make_engine=Models({}))
    return folder


@pytest.fixture
def twice(once_trained_twice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(once_trained_twice, tmp_path / "here"))


def files(folder: Path = FIRST) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_the_model_of_the_iteration_before_is_proposed_where_no_checkpoint_passes(twice, tiny_model):
    config, models, first = configured(tiny_model, iterations=2), Models({**LOST, "iteration-1/model": 5.75}), files()
    e = loses(config, models)
    s = summary()
    proposed = FIRST / "model"
    assert (s["model_path"], s["gate"]["proposed"]) == (None, {"iteration": 1, "step": None, "path": str(proposed)})
    assert [(c["iteration"], c["step"], c["verdict"], c["difference"]) for c in s["gate"]["checkpoints"]] == [
        (2, 2, "lost", pytest.approx(-1)),
        (2, 1, "lost", pytest.approx(-2)),
        (1, None, "held", pytest.approx(-0.25)),
    ]
    assert f"iteration 1's model passes and is proposed instead: {proposed}" in e.message
    assert "read answers of the proposed model in evaluation/iteration-1 before you use it" in e.hint
    assert "  iteration 1's model: passes; alpha -0.25" in shown(s)
    assert f"proposed, iteration 1's model: {proposed}\n" in shown(s)
    assert (names(FIRST), names(SECOND)) == ({"model"}, {"model-failed-gate", "kept"})
    after = files()
    card = after.pop(str(proposed / "README.md"))[0].decode()
    assert after == first, "it stays as and where it is"
    assert "**This is not the final model but that of iteration 1**: the final model failed" in card
    assert "iteration 1's model is proposed instead" in (SECOND / "model-failed-gate/README.md").read_text()

    done, written = manifests(), files()
    loses(config, lambda _: pytest.fail("nothing is loaded for a run that is done"))
    assert (summary(), manifests(), files()) == (s, done, written)
    Path("runs/test/summary.json").unlink()
    loses(config, lambda _: pytest.fail("nothing is loaded for a run that is done"))
    assert (summary()["gate"], manifests(), files()) == (s["gate"], done, written)


def test_a_checkpoint_of_the_last_iteration_comes_first(twice, tiny_model):
    models = Models({**SAVED, "iteration-1/model": 6.0})
    loses(configured(tiny_model, iterations=2), models)
    assert summary()["gate"]["proposed"] == {"iteration": 2, "step": 1, "path": str(SECOND / "model-checkpoint-1")}
    assert not Path("runs/test/evaluation/iteration-1").exists()
    assert (names(FIRST), names(SECOND)) == ({"model"}, {"model-failed-gate", "model-checkpoint-1", "kept"})
    assert not (FIRST / "model/README.md").exists()


def test_no_model_of_an_iteration_before_passes(twice, tiny_model):
    first = files()
    e = loses(configured(tiny_model, iterations=2), Models(LOST))
    g = summary()["gate"]
    assert (g["proposed"], [(c["iteration"], c["step"]) for c in g["checkpoints"]]) == (None, [(2, 2), (2, 1), (1, None)])
    assert "none of 2 earlier checkpoints of the last iteration passes, and no earlier iteration's model passes" in e.message
    assert files() == first
    assert names(SECOND) == {"model-failed-gate", "kept"}
    # a margin of 0.9, and the first model is asked no more: it lost 3
    models = Models({})
    loses(configured(tiny_model, iterations=2, evaluation=evaluation(margin=0.9)), models, mode="resume")
    assert (models.loaded, summary()["gate"]["proposed"]) == ([], None)
    assert files() == first


def test_interrupted_at_the_model_of_an_iteration_before_it_goes_on(twice, tiny_model):
    config, models, first = configured(tiny_model, iterations=2), Models({**LOST, "iteration-1/model": 6.0}), files()

    def interrupted(name: str) -> ScriptedEngine:
        if name == str(FIRST / "model"):
            raise KeyboardInterrupt
        return models(name)

    with pytest.raises(KeyboardInterrupt):
        run(config, make_engine=interrupted)
    assert files() == first
    models.loaded.clear()
    loses(config, models)
    assert "model" in models.loaded and "checkpoint-2" not in models.loaded
    assert summary()["gate"]["proposed"]["iteration"] == 1


def test_a_model_of_an_iteration_before_that_was_removed_is_not_tried(twice, tiny_model):
    shutil.rmtree(FIRST / "model")
    shutil.rmtree(SECOND / "kept")
    e = loses(configured(tiny_model, iterations=2), Models(LOST))
    assert e.message.endswith("; no earlier checkpoint of the last iteration was kept")


def test_iterations_before_the_last_are_tried_from_the_newest(here, tiny_model):
    config = configured(tiny_model, iterations=3, train={"epochs": 1, "keep_checkpoints": 0, "guard": OFTEN, "lora": {"r": 4}})
    models = Models({"iteration-3/model": 3.0, "iteration-2/model": 4.0, "iteration-1/model": 5.75})
    loses(config, models)
    g = summary()["gate"]
    assert [(c["iteration"], c["step"], c["passed"]) for c in g["checkpoints"]] == [(2, None, False), (1, None, True)]
    assert g["proposed"] == {"iteration": 1, "step": None, "path": str(FIRST / "model")}
    assert names(FIRST) == names(SECOND) == {"model", "adapter"}
    assert names(Path("runs/test/iteration-3/6-train")) == {"model-failed-gate", "adapter-failed-gate"}
    assert not list(SECOND.rglob("README.md"))
    for name, library in (("model", "transformers"), ("adapter", "peft")):
        card = (FIRST / name / "README.md").read_text()
        assert "**This is not the final model but that of iteration 1**" in card
        assert f"library_name: {library}" in card
        assert "after 1 iteration of" in card and "| iteration 2 |" not in card
    # a margin of 0.2: the first one lost 0.25
    models.loaded.clear()
    e = loses(config_from(config.model_dump(), ("evaluation.gate.margin=0.2",)), models, mode="resume")
    assert "no earlier checkpoint of the last iteration was kept, and no earlier iteration's model passes" in e.message
    assert (models.loaded, summary()["gate"]["proposed"]) == ([], None)


def test_a_card_that_an_iteration_before_had_as_the_last_one_says_that_it_is_proposed(failed, tiny_model):
    assert "this model is not handed over, do not use it" in (STAGE / "model-failed-gate/README.md").read_text()
    loses(configured(tiny_model, iterations=2), Models({**LOST, "iteration-1/model": 6.0}), mode="resume")
    assert names(FIRST) == {"model", "kept"}
    card = (FIRST / "model/README.md").read_text()
    assert "**This is not the final model but that of iteration 1**" in card
    assert "do not use it" not in card


def test_a_folder_that_holds_both_names_is_refused(failed, tiny_model):
    shutil.copytree(STAGE / "model-failed-gate", STAGE / "model")
    with pytest.raises(RunFolderError, match="has both model and model-failed-gate"):
        run(configured(tiny_model), make_engine=Models(LOST))


# checkpoints


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize(("keep", "left"), [(0, []), (1, [4, 3]), (5, [4, 3, 2, 1])])
def test_the_weights_of_so_many_checkpoints_before_the_last_are_kept(tmp_path, monkeypatch, keep, left, links):
    """Four steps; the trainer keeps its last two checkpoints. A fifth is torn by a kill: it has no trainer_state.json yet."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    files = ("model.safetensors", "config.json", "optimizer.pt", "trainer_state.json")
    for step in (1, 2, 3, 4):
        made = tmp_path / f"checkpoints/checkpoint-{step}"
        made.mkdir(parents=True)
        for file in files:
            (made / file).write_text(json.dumps({"step": step}))
        keep_weights(tmp_path, keep)
        shutil.rmtree(tmp_path / f"checkpoints/checkpoint-{step - 1}", ignore_errors=True)
    (tmp_path / "checkpoints/checkpoint-5").mkdir()
    (tmp_path / "checkpoints/checkpoint-5/model.safetensors").write_text("torn")
    keep_weights(tmp_path, keep)
    kept = kept_checkpoints(tmp_path)
    assert [p.name for p in kept] == [f"checkpoint-{i}" for i in left]
    for p, step in zip(kept, left, strict=True):
        assert {f.name for f in p.iterdir()} == {"model.safetensors", "config.json"}
        assert {json.loads(f.read_text())["step"] for f in p.iterdir()} == {step}
    newest = tmp_path / "kept/checkpoint-4/config.json"
    assert not newest.exists() or newest.samefile(tmp_path / "checkpoints/checkpoint-4/config.json") == links


def test_checkpoints_kept_before_a_kill_are_there_after_it(here, tiny_model, monkeypatch):
    """Killed at the probe of step 4: the trainer's own folder has the last two checkpoints, the third is only kept."""
    from spalign.training import guard

    config = configured(tiny_model, train={"epochs": 5, "guard": OFTEN})
    verdicts = iter([None, None, None])
    monkeypatch.setattr(guard, "collapse", lambda *_: next(verdicts))
    with pytest.raises(StopIteration):
        run(config, make_engine=Models(LOST))
    assert {p.name for p in (STAGE / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert {p.name for p in (STAGE / "kept").iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    monkeypatch.setattr(guard, "collapse", lambda *_: None)
    models = Models({"model": 3.0, **{f"checkpoint-{i}": 3.0 for i in range(6)}})
    loses(config, models)
    assert [c["step"] for c in summary()["gate"]["checkpoints"]] == [4, 3, 2]  # three before the last


def test_an_adapter_that_failed_is_renamed_too_and_a_proposed_one_is_merged(here, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train = {"epochs": 3, "guard": OFTEN, "lora": {"r": 4}, "learning_rate": 1e-3}
    loses(configured(tiny_model, train=train), Models(SAVED))
    kinds = {"model-failed-gate", "adapter-failed-gate", "model-checkpoint-1", "adapter-checkpoint-1", "kept"}
    assert names() == kinds
    base, merged = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval() for m in (tiny_model, STAGE / "model-checkpoint-1"))
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        whole = merged(ids).logits
        adapted = PeftModel.from_pretrained(base, STAGE / "adapter-checkpoint-1").eval()(ids).logits
    torch.testing.assert_close(whole, adapted, rtol=0, atol=1e-4)

    texts = [c["text"] for c in summary()["gate"]["checkpoints"]]  # of steps 2 and 1, the second of which passes
    cards = {name: (STAGE / name / "README.md").read_text() for name in kinds - {"kept"}}
    for name, card in cards.items():
        assert (f"| checkpoint 1 | passed | {texts[1]} |" in card) == ("checkpoint" in name)
        assert ("**This is not the final model but the checkpoint of step 1**" in card) == ("checkpoint" in name)
        assert ("this model is not handed over, do not use it" in card) == ("failed" in name)
        assert ("library_name: peft" in card) == name.startswith("adapter")
        assert summary()["gate"]["text"] in card
    written = {name: (STAGE / name / "README.md").stat().st_mtime_ns for name in cards}
    loses(configured(tiny_model, train=train), lambda _: pytest.fail("nothing is loaded for a run that is done"))
    assert {name: (STAGE / name / "README.md").stat().st_mtime_ns for name in cards} == written
