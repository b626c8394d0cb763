"""Exports, loaded by the tools they are for: LLaMA-Factory's and axolotl's own data code, each in a process of its own.

Both pin older versions of what spalign uses; `make test` puts them, without their dependencies, into a folder beside the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import data_stages, settings

from spalign.pipeline.export import export

BESIDE = Path(sys.prefix) / "peers"


@pytest.mark.skipif(not BESIDE.is_dir(), reason="needs llamafactory and axolotl beside the environment, see the top of the file")
@pytest.mark.parametrize("to", ["llama-factory", "axolotl"])
def test_it_reads_every_pair(tmp_path: Path, tiny_model: Path, to: str) -> None:
    from transformers import AutoTokenizer

    config = settings(tmp_path, tiny_model, ["keep", "keep"])
    data_stages(config)
    _, count = export(config.folder, tmp_path / "out", to=to)
    pairs = [json.loads(line) for line in export(config.folder, tmp_path / "trl", to="trl")[0].read_text().splitlines()]
    env = {
        **os.environ,
        "PYTHONPATH": str(BESIDE),
        "HF_HUB_OFFLINE": "1",
        "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    command = [sys.executable, __file__, to, str(tiny_model), str(tmp_path / "out"), str(tmp_path / "work")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "work/rows.json").read_text())
    assert len(rows) == count == len(pairs) > 0
    special = AutoTokenizer.from_pretrained(tiny_model).all_special_tokens

    def said(text: str) -> str:
        for token in special:
            text = text.replace(token, "")
        return text.strip()

    for row, pair in zip(rows, pairs, strict=True):
        assert pair["prompt"][-1]["content"].strip() in row["prompt"]
        assert said(row["chosen"]) == pair["chosen"][0]["content"].strip()
        assert said(row["rejected"]) == pair["rejected"][0]["content"].strip()


def llama_factory(model: str, folder: str, work: str) -> list[dict[str, Any]]:
    """What its DPO would train on: the sides' own tokens are those with a label."""
    import transformers
    import trl  # noqa: F401  before the name below stands for a package that is none

    sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # imported for sound, of which there is none here
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    options = {"stage": "dpo", "do_train": True, "dataset": "spalign", "dataset_dir": folder, "template": "chatml", "report_to": "none"}
    parsed = get_train_args({"model_name_or_path": model, "output_dir": work, "finetuning_type": "lora", **options})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    template = get_template_and_fix_tokenizer(tokenizer, parsed[1])
    data = get_dataset(template, *parsed[:3], stage="rm", tokenizer=tokenizer, processor=None)["train_dataset"]
    return [
        {
            "prompt": tokenizer.decode(row["chosen_input_ids"]),
            **{side: tokenizer.decode([t for t in row[f"{side}_labels"] if t >= 0]) for side in ("chosen", "rejected")},
        }
        for row in data
    ]


def axolotl(model: str, folder: str, work: str) -> list[dict[str, Any]]:
    """What its DPO would train on."""
    import transformers
    from axolotl.utils.data.rl import prepare_preference_datasets
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.enums import RLType

    data = {"path": f"{folder}/pairs.jsonl", "ds_type": "json", "split": "train", "type": "chat_template.default"}
    config = DictDefault(
        base_model=model,
        tokenizer_config=model,
        tokenizer_type="AutoTokenizer",
        chat_template="tokenizer_default",
        rl=RLType.DPO,
        datasets=[data],
        sequence_len=4096,
        dataset_prepared_path=work,
        dataset_num_proc=1,
    )
    rows, _ = prepare_preference_datasets(config, transformers.AutoTokenizer.from_pretrained(model))
    return list(rows)


if __name__ == "__main__":
    to, model, folder, work = sys.argv[1:]
    Path(work).mkdir()
    rows = {"llama-factory": llama_factory, "axolotl": axolotl}[to](model, folder, work)
    (Path(work) / "rows.json").write_text(json.dumps(rows))
