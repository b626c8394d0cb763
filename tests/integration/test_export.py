"""Exports, each taken by the tool it is for: TRL's trainers, Hugging Face data sets; and the shapes that the others document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import data_stages, settings

from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.export import export


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


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'csv'"):
        export(run, tmp_path / "x", to="csv")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(run, run)
    with pytest.raises(RunFolderError, match="no finished pairs in iteration 7"):
        export(run, tmp_path / "y", iteration=7)
    with pytest.raises(RunFolderError, match="no run"):
        export(tmp_path, tmp_path / "z")
