"""Exports, each taken by the tool it is for: TRL's trainers, Hugging Face data sets; and the shapes that the others document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import data_stages, settings

from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline import export as export_module
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


@pytest.mark.parametrize("to", ["trl", "llama-factory", "axolotl", "parquet"])
def test_half_a_character_and_rows_in_groups(run: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a surrogate pair has no bytes in UTF-8; a run may have more rows than memory should hold."""
    from datasets import load_dataset

    monkeypatch.setattr(export_module, "_ROW_GROUP", 2)
    part = next((run / "iteration-1/5-pair").glob("part-*.jsonl"))
    lines = part.read_bytes().splitlines()
    first = json.loads(lines[0])
    first["chosen"][0]["content"] = "half \ud83d a face"
    part.write_bytes(b"\n".join([json.dumps(first).encode(), *lines[1:]]) + b"\n")
    path, count = export(run, tmp_path / "out", to=to)
    kind = "parquet" if to == "parquet" else "json"
    data = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == count == len(lines) > 2
    assert "half ? a face" in json.dumps(data[0]["chosen"])


def test_a_run_without_pairs_writes_nothing(run: Path, tmp_path: Path) -> None:
    next((run / "iteration-1/5-pair").glob("part-*.jsonl")).write_bytes(b"")
    with pytest.raises(RunFolderError, match="iteration-1 has no pairs"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no format 'csv'"):
        export(run, tmp_path / "x", to="csv")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(run, run)
    with pytest.raises(RunFolderError, match="no finished pairs in iteration 7"):
        export(run, tmp_path / "y", iteration=7)
    with pytest.raises(RunFolderError, match="no run"):
        export(tmp_path, tmp_path / "z")
