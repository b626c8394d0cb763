"""What a run leaves beside its model, and what a push that fails leaves of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_pipeline import engine, settings

from spalign.config import config_from
from spalign.errors import HubError
from spalign.pipeline import run


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("summary.json", "run.lock")
    }


def test_cards_of_a_run_and_a_push_that_fails(tmp_path, tiny_model, monkeypatch):
    config = settings(tmp_path, tiny_model, ["keep"] * 2, train={"lora": {"r": 4}})
    summary = run(config, make_engine=engine).summary
    assert summary is not None
    folder = config.folder / "iteration-1/6-train"
    model, adapter = ((folder / name / "README.md").read_text() for name in ("model", "adapter"))
    assert "library_name: transformers" in model
    assert "library_name: peft" in adapter
    for card in (model, adapter):
        assert summary["constitution"]["sha256"] in card
        assert all(use["sha256"] in card and str(use["count"]) in card for use in summary["prompts"].values())
        assert str(tmp_path) not in card
    there = state(config.folder)
    monkeypatch.setenv("HF_TOKEN", "hf_x")  # HF_HUB_OFFLINE is set for all tests
    pushing = config_from(config.model_dump(), ("train.push_to_hub=me/mine", "train.report_to=[]"))
    with pytest.raises(HubError, match="could not be pushed to 'me/mine'") as e:
        run(pushing, make_engine=lambda _: pytest.fail("nothing is done again to push"))
    assert e.value.exit_code == 2
    kept = state(config.folder)
    changed = {p for p in kept if kept[p] != there.get(p)} - {str(config.folder / n) for n in ("config.yaml", "constitution.yaml")}
    assert not changed
    assert {p: v[0] for p, v in kept.items()} == {p: v[0] for p, v in there.items()}  # not even in the configuration on record


def test_tensorboard_files_outlive_the_checkpoints(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["keep"] * 2, train={"report_to": "tensorboard"})
    run(config, make_engine=engine)
    stage = config.folder / "iteration-1/6-train"
    assert not (stage / "checkpoints").exists()
    assert any(p.stat().st_size > 500 for p in (stage / "tensorboard").glob("events.*"))


def test_a_single_step_is_no_warm_up(tmp_path, tiny_model):
    config = settings(tmp_path, tiny_model, ["keep"] * 2, train={"epochs": 1, "learning_rate": 1e-5})
    run(config, make_engine=engine, until="train")
    (step,) = json.loads((config.folder / "iteration-1/6-train/log.json").read_text())["steps"]
    assert step["learning_rate"] == pytest.approx(1e-5)
    after, before = (load_file(next(Path(f).glob("*.safetensors"))) for f in (config.folder / "iteration-1/6-train/model", tiny_model))
    assert any((after[name] != before[name]).any() for name in after.keys() & before.keys())
