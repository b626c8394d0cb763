"""Prompts from Parquet files and from `datasets`; what happens without them; and what importing the loader costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from spalign.config import PromptsConfig, PromptSource
from spalign.errors import PromptError
from spalign.prompts import load_prompts
from spalign.types import Message, Prompt


def load(source: Path | str, **options) -> list[Prompt]:
    return load_prompts(PromptSource(source=str(source), **options), PromptsConfig())


def refused(source: Path | str, **options) -> str:
    with pytest.raises(PromptError) as caught:
        load(source, **options)
    assert caught.value.hint, "every error says what to do"
    return str(caught.value)


def table(folder: Path, name: str = "p.parquet", **columns: object) -> Path:
    path = folder / name
    parquet.write_table(pa.table(columns), path)
    return path


def python(code: str, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_parquet_texts(tmp_path):
    path = table(tmp_path, id=pa.array([1, None]), prompt=["a", "b\x00"], topic=["t", None], picture=[b"x", b"y"])
    assert load(path) == [Prompt("1", (Message("user", "a"),), "t"), Prompt("row-00002", (Message("user", "b\x00"),))]


def test_parquet_turns_and_a_folder_that_looks_like_a_partition(tmp_path):
    folder = tmp_path / "id=5"
    folder.mkdir()
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (prompt,) = load(table(folder, chat=[turns]), column="chat")
    assert prompt == Prompt("row-00001", (Message("system", "s"), Message("user", "u")))


def test_parquet_mistakes_name_the_row(tmp_path):
    path = table(tmp_path, prompt=["a", "", None, "x" * 200_000])
    message = refused(path)
    assert f"{path}: row 2: the prompt is empty" in message
    assert f"{path}: row 3: 'prompt' is null" in message
    assert f"{path}: row 4: the prompt is 200,000 characters long" in message
    assert "no column 'prompt'; did you mean 'prompts'? (columns: prompts)" in refused(table(tmp_path, prompts=["a"]))
    assert "no prompts in it" in refused(table(tmp_path, prompt=pa.array([], pa.string())))


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    for content in (b"", b"hello, I am text", b"PAR1" + b"\0" * 40 + b"PAR1"):
        path.write_bytes(content)
        assert f"{path}: cannot be read as Parquet" in refused(path)
    raw = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    assert "cannot be read as Parquet" in refused(table(tmp_path, prompt=raw))
    assert "no such file" in refused(tmp_path / "none.parquet")


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "p.parquet"), ("datasets", "org/name")])
def test_a_missing_extra_says_the_exact_line(tmp_path, monkeypatch, module, name):
    if module == "pyarrow":
        name = str(table(tmp_path, prompt=["a"]))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PromptError) as caught:
        load(name)
    assert caught.value.hint == "pip install 'spalign[data]'"
    assert f"needs {module}" in caught.value.message


# One process that stands offline, with a cache of its own, loads a local folder and asks for things that are not there.
HUB = """
import json, sys, time
from spalign.config import PromptsConfig, PromptSource
from spalign.errors import PromptError
from spalign.prompts import load_prompts
folder = sys.argv[1]
cases = {
    "folder": dict(source=folder, column="chat"),
    "test": dict(source=folder, split="test", column="chat"),
    "split": dict(source=folder, split="validation"),
    "subset": dict(source=folder, subset="english"),
    "column": dict(source=folder, column="chats"),
    "row": dict(source=folder, column="text"),
    "empty": dict(source=folder + "/empty"),
    "offline": dict(source="org/name"),
}
import datasets
out = {}
for name, case in cases.items():
    start = time.perf_counter()
    try:
        out[name] = [[p.id, p.text, p.topic] for p in load_prompts(PromptSource(**case), PromptsConfig())]
    except PromptError as e:
        out[name] = str(e)
    out[name + " seconds"] = time.perf_counter() - start
out["torch"] = "torch" in sys.modules
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    folder = root / "data set"
    (folder / "empty").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"id": n, "topic": split, "chat": [{"role": "user", "content": f"{split} {n}"}], "text": "a" * n} for n in range(2)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return json.loads(python(HUB, str(folder), HF_HOME=str(root / "cache"), HF_HUB_OFFLINE="1"))


def test_a_folder_that_datasets_loads(hub):
    assert hub["folder"] == [["0", "train 0", "train"], ["1", "train 1", "train"]]
    assert hub["test"] == [["0", "test 0", "test"], ["1", "test 1", "test"]]
    assert not hub["torch"], "prompts need no torch"


@pytest.mark.parametrize(
    ("case", "says", "fix"),
    [
        ("split", "Unknown split", "`split`"),
        ("subset", "'english' not found", "`subset`"),
        ("column", "no column 'chats'; did you mean 'chat'? (columns: id, topic, chat, text)", "`column`"),
        ("row", "row 1: the prompt is empty", "write a text"),
        ("empty", "cannot be loaded", ".jsonl"),
        ("offline", "org/name (split 'train'): cannot be loaded", "HF_HUB_OFFLINE"),
    ],
)
def test_failures_of_datasets_say_what_to_do(hub, case, says, fix):
    message, _, hint = hub[case].partition("\n  fix: ")
    assert says in message
    assert fix in hint


def test_offline_is_quick(hub):
    assert hub["offline seconds"] < 5


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (
            RuntimeError("Dataset 'org/split-config' is a gated dataset on the Hub."),
            "accept its terms on https://huggingface.co/datasets/org/split-config",
        ),
        (RuntimeError("Dataset 'org/split-config' doesn't exist on the Hub or cannot be accessed."), "check the name"),
        (ValueError("Config name is missing.\nPlease pick one among: ['a']"), "`subset`"),
        (ConnectionError("Couldn't reach 'org/split-config' on the Hub"), "network"),
        (KeyError("?"), "check the name, the split and the subset"),
    ],
)
def test_advice_follows_what_the_hub_says(monkeypatch, error, fix):
    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise error

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    message = refused("org/split-config")
    assert fix in message.partition("\n  fix: ")[2]
    assert len(message.splitlines()) == 2


def test_importing_the_loader_and_reading_jsonl_imports_nothing_heavy():
    code = """
import sys
from spalign.config import PromptsConfig
from spalign.prompts import load_prompts
load_prompts(PromptsConfig().train, PromptsConfig())
print(sorted({"torch", "transformers", "numpy", "pyarrow", "datasets"} & set(sys.modules)))
"""
    assert python(code).strip() == "[]"
