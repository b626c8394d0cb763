"""Exports, each taken by the tool it is for: TRL's trainers, Hugging Face data sets; and the shapes that the others document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pipeline import data_stages, settings

from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline import export as export_module
from spalign.pipeline.export import export
from spalign.pipeline.look import finished
from spalign.store import Stage


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    config = settings(tmp_path, tiny_model, ["keep", "keep"])
    data_stages(config)
    return Path(config.folder)


@pytest.mark.parametrize("kind", ["cpo", "dpo"])
def test_trl_trains_on_it(run: Path, tmp_path: Path, tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason="needs trl")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, count = export(run, tmp_path / "out", to="trl")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == count > 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    common = {"output_dir": str(tmp_path / "trl"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    trainer: Any
    if kind == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        args = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, bf16=False, max_length=512)
        trainer = CPOTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    else:
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(model, args=DPOConfig(**common, bf16=False, max_length=512), train_dataset=data, processing_class=tokenizer)
    assert trainer.train().training_loss > 0


def test_parquet_and_the_same_rows(run: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    lines, count = export(run, tmp_path / "a", to="trl")
    path, same = export(run, tmp_path / "b", to="parquet")
    data = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert count == same == len(data)
    assert [r["id"] for r in rows] == data["id"]
    assert data[0]["chosen"] == rows[0]["chosen"]


def test_the_shapes_of_the_others(run: Path, tmp_path: Path) -> None:
    path, count = export(run, tmp_path / "lf", to="llama-factory")
    rows = json.loads(path.read_text())
    info = json.loads((tmp_path / "lf/dataset_info.json").read_text())["spalign"]
    assert len(rows) == count
    assert info["ranking"] is True
    assert (tmp_path / "lf" / info["file_name"]).exists()
    assert set(info["columns"].values()) == set(rows[0])
    assert [t["from"] for t in rows[0]["conversations"]] == ["human"]
    assert rows[0]["chosen"]["from"] == rows[0]["rejected"]["from"] == "gpt"
    path, _ = export(run, tmp_path / "ax", to="axolotl")
    row = json.loads(path.read_text().splitlines()[0])
    assert row["messages"][-1]["role"] == "user"
    assert row["chosen"]["role"] == row["rejected"]["role"] == "assistant"
    card = (tmp_path / "ax/README.md").read_text()
    assert f"{count} pairs of iteration-1" in card
    assert "No person has labelled them" in card


@pytest.mark.parametrize("to", ["trl", "llama-factory", "axolotl", "parquet"])
def test_half_a_character_and_rows_in_groups(run: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a surrogate pair has no bytes in UTF-8; a run may have more rows than memory should hold."""
    from datasets import load_dataset

    monkeypatch.setattr(export_module, "_ROW_GROUP", 2)
    rows = pairs_of(run)
    rows[0]["chosen"][0]["content"] = "half \ud83d a face"
    write_pairs(run, 1, rows)
    path, count = export(run, tmp_path / "out", to=to)
    kind = "parquet" if to == "parquet" else "json"
    data = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == count == len(rows) > 2
    assert "half ? a face" in json.dumps(data[0]["chosen"])


def pairs_of(run: Path, iteration: int = 1) -> list[dict[str, Any]]:
    stage = finished(run / f"iteration-{iteration}/5-pair")
    assert stage is not None
    return list(stage.rows())


def write_pairs(run: Path, iteration: int, rows: list[dict[str, Any]]) -> None:
    stage = Stage(run / f"iteration-{iteration}/5-pair", {"of": "the test"})
    stage.begin()
    stage.write_part(0, rows)
    stage.finish()


def test_the_last_iteration_that_has_pairs(run: Path, tmp_path: Path) -> None:
    write_pairs(run, 2, [])
    assert export(run, tmp_path / "a")[1] == len(pairs_of(run)) > 0
    with pytest.raises(RunFolderError, match="no pairs in iteration 2"):
        export(run, tmp_path / "b", iteration=2)
    write_pairs(run, 1, [])
    with pytest.raises(RunFolderError, match="no pairs in any iteration"):
        export(run, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_export_is_whole_or_not_there(run: Path, tmp_path: Path) -> None:
    part = next((run / "iteration-1/5-pair").glob("part-*.jsonl"))
    was, constitution = part.read_bytes(), (run / "constitution.yaml").read_bytes()
    write_pairs(run, 1, [*pairs_of(run), {"prompt": "half a row"}])
    with pytest.raises(KeyError):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []
    part.write_bytes(was + b" ")  # not what the manifest says
    with pytest.raises(RunFolderError, match="changed since it was written"):
        export(run, tmp_path / "out")
    part.write_bytes(was)
    for damage in (b"{", b""):
        (run / "constitution.yaml").write_bytes(damage)
        with pytest.raises(RunFolderError, match=r"constitution\.yaml"):
            export(run, tmp_path / "out")
    (run / "constitution.yaml").write_bytes(constitution)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


def test_the_card_says_who_scored_and_not_where_files_lay(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    export(run, tmp_path / "own")
    card = (tmp_path / "own/README.md").read_text()
    assert "The scores are the model's own" in card
    assert str(tiny_model.parent) not in card
    assert str(tmp_path) not in card
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["self_evaluation"]["judge"] = "org/judge"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export(run, tmp_path / "other")
    assert "The scores are those of `org/judge`" in (tmp_path / "other/README.md").read_text()


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'csv'"):
        export(run, tmp_path / "x", to="csv")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(run, run)
    with pytest.raises(RunFolderError, match="no finished pairs in iteration 7"):
        export(run, tmp_path / "y", iteration=7)
    with pytest.raises(RunFolderError, match="no run"):
        export(tmp_path, tmp_path / "z")
