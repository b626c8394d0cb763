"""A run's preference pairs in the formats of other trainers, with a data card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.look import finished, iterations, on_record
from spalign.prompts import exists
from spalign.store import Row, Stage, clear_errors, write_atomic
from spalign.text import one_line, printable

_ROW_GROUP = 5000
"""Rows of a Parquet file that are in memory at a time."""
_EXTRA = ("id", "prompt_id", "topic", "intent", "margin", "gap", "weight", "decided_by", "scores_chosen", "scores_rejected")


def trl(row: Mapping[str, Any]) -> Row:
    """TRL's conversational preference format: `prompt`, `chosen`, `rejected` as turns; other columns are ignored by its trainers."""
    return {**{k: row[k] for k in ("prompt", "chosen", "rejected")}, **{k: row[k] for k in _EXTRA}}


def llama_factory(row: Mapping[str, Any]) -> Row:
    """LLaMA-Factory's ShareGPT preference format; dataset_info.json beside the data names its columns."""
    turns = [t for t in row["prompt"] if t["role"] != "system"]
    system = "\n".join(t["content"] for t in row["prompt"] if t["role"] == "system")
    names = {"user": "human", "assistant": "gpt"}
    sides = {side: {"from": "gpt", "value": row[side][0]["content"]} for side in ("chosen", "rejected")}
    return {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns], "system": system, **sides}


def axolotl(row: Mapping[str, Any]) -> Row:
    """axolotl's `type: chat_template.default` for DPO and its kin: messages, and one answer of each kind."""
    return {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}


_AS: dict[str, Callable[[Mapping[str, Any]], Row]] = {"trl": trl, "llama-factory": llama_factory, "axolotl": axolotl, "parquet": trl}
_INFO = {
    "spalign": {
        "file_name": "pairs.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"},
    }
}
_USE = {
    "trl": 'load_dataset("json", data_files="pairs.jsonl")  # for CPOTrainer, DPOTrainer, ...',
    "parquet": 'load_dataset("parquet", data_files="pairs.parquet")  # for CPOTrainer, DPOTrainer, ...',
    "llama-factory": "dataset: spalign, dataset_dir: this folder, stage: dpo",
    "axolotl": "datasets: [{path: pairs.jsonl, ds_type: json, split: train, type: chat_template.default}], rl: dpo",
}


def export(run: Path, out: Path, *, to: str = "trl", iteration: int | None = None) -> tuple[Path, int]:
    """Write the pairs of an iteration (default: the last that has any) as a new folder; its data file, and how many pairs.

    The folder is there when it is whole. Raises ConfigError for an unknown format or a folder that is not empty, RunFolderError where the
    run has no pairs.
    """
    if to not in _AS:
        raise ConfigError(f"no format '{to}'", hint=f"one of: {', '.join(_AS)}")
    where = f"iteration {iteration}" if iteration else "any iteration"
    bases = [b for b in iterations(run) if iteration is None or b.name == f"iteration-{iteration}"]
    stages = [(b.name, stage) for b in bases if (stage := finished(b / "5-pair"))]
    if not stages:
        raise RunFolderError(f"{run}: no finished pairs in {where}", hint="run it up to 5-pair first")
    told = on_record(run)
    last = next(((name, stage, rows) for name, stage in reversed(stages) if (rows := _rows_of(stage))), None)
    if last is None:
        raise RunFolderError(f"{run}: no pairs in {where}", hint="spalign show says where the prompts went")
    name, stage, rows = last
    with clear_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out}: exists and is not an empty folder", hint="name a new folder; nothing is overwritten")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent) as beside:
            half = Path(beside) / "data"
            half.mkdir()
            file, count = _write(map(_AS[to], rows), half, to)
            write_atomic(half / "README.md", _card(*told, name, stage.manifest() or {}, to, file, count).encode("utf-8", "replace"))
            half.replace(out)
    return out / file, count


def _rows_of(stage: Stage) -> Iterator[Row] | None:
    """None where there are none."""
    rows = stage.rows()
    first = next(rows, None)
    return None if first is None else chain([first], rows)


def _write(rows: Iterator[Row], out: Path, to: str) -> tuple[str, int]:
    """The data file's name and rows. Row by row, or a few thousand at a time: a run may have millions."""
    if to == "parquet":
        return "pairs.parquet", _parquet(rows, out / "pairs.parquet")
    array = to == "llama-factory"  # which reads one JSON array
    if array:
        write_atomic(out / "dataset_info.json", json.dumps(_INFO, indent=2).encode())
    name, count = ("pairs.json" if array else "pairs.jsonl"), 0
    with clear_errors(out), (out / name).open("wb") as f:
        for count, row in enumerate(rows, 1):
            if array:
                f.write(b"[" if count == 1 else b",")
            f.write(_line(row))
        if array:
            f.write(b"]\n")
    return name, count


def _line(row: Row) -> bytes:
    """A line of JSON that any reader takes: half a surrogate pair, which UTF-8 has no bytes for, is a question mark."""
    try:
        return msgspec.json.encode(row) + b"\n"
    except UnicodeEncodeError:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _parquet(rows: Iterator[Row], path: Path) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise ConfigError("Parquet needs the package pyarrow, which is not installed", hint="pip install 'spalign[data]'") from e
    count, writer = 0, None
    with clear_errors(path):
        try:
            while some := [msgspec.json.decode(_line(row)) for row in islice(rows, _ROW_GROUP)]:
                table = pa.Table.from_pylist(some, schema=writer.schema if writer else None)
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
                count += len(some)
        finally:
            if writer:
                writer.close()
    return count


def _card(
    config: Mapping[str, Any], constitution: Mapping[str, Any], iteration: str, manifest: Mapping[str, Any], to: str, data: str, count: int
) -> str:
    funnel = manifest.get("funnel") or {}
    dropped = "\n".join(f"- dropped, {reason}: {n}" for reason, n in funnel.get("dropped", {}).items())

    def line(value: Any) -> str:
        return one_line(printable(str(value))).replace("`", "'").replace("<", "&lt;")

    def name(value: str) -> str:
        """Of a local file or folder its name alone: where it lay is nobody's concern."""
        path = Path(value).expanduser()
        return line(path.name if exists(path) or path.is_absolute() else value)

    judge = (config.get("self_evaluation") or {}).get("judge")
    scores = f"The scores are those of `{name(judge)}`" if judge else "The scores are the model's own"
    return f"""---
tags: [spalign, preference]
configs: [{{config_name: default, data_files: {data}}}]
---
# Preference pairs by Self-Priority Alignment

{count} pairs of {iteration} of the run `{line(config["name"])}`. Prompts: `{name(config["prompts"]["train"]["source"])}`.
The answers are those of the model (`{name(config["model"])}`). {scores}, by the constitution `{line(constitution["name"])}`
({", ".join(line(o["name"]) for o in constitution["objectives"])}, in order of priority). No person has labelled them.

- prompts in: {funnel.get("prompts")}, kept: {funnel.get("kept")}
{dropped}

Use ({to}): `{_USE[to]}`

The prompts are high-stakes by design, and the rejected answers may be harmful: they are there to be learned from as what not to say. The
licences of the prompts and of the model that answered hold for this data.
"""
