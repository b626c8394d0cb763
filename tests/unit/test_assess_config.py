"""Configurations of `spalign judge` that are none, each told where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from spalign.config import load_assess
from spalign.errors import ConfigError

GOOD: dict[str, Any] = {"name": "e", "models": {"vanilla": "demo"}, "judge": {"model": "openai/gpt-4o"}}


def load(folder: Path, **more: Any) -> Any:
    (folder / "e.yaml").write_text(yaml.safe_dump({**GOOD, **more}))
    return load_assess(folder / "e.yaml")


def test_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.judge.own is None
    assert load(tmp_path, judge={"model": "spalign/org/name"}).judge.own == "org/name"
    assert load(tmp_path, judge=None, prompts=None, mmlu={"source": "mmlu"}).judge is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"models": {}}, "models"),
        ({"models": {"a b": "demo"}}, "models"),
        ({"judge": {"model": "gpt-4o"}}, "judge.model"),
        ({"judge": None}, "who judges"),
        ({"judge": {"model": "spalign/demo", "base_url": "http://x"}}, "base_url is for a model of Inspect's"),
        ({"judge": {"model": "spalign/demo", "args": {"a": 1}}}, "args are for"),
        ({"judge": {"model": "openai/x", "judge_file": "j.yaml"}}, "are for a spalign/ model"),
        ({"judge": {"model": "openai/x", "base_url": "http://user:secret@host/v1"}}, "a key belongs into an environment variable"),
        ({"judge": {"model": "openai/x", "base_url": "nonsense"}}, "expected an address"),
        ({"engine": {"kind": "openai", "base_url": "http://x"}}, "models answer here"),
        ({"mmlu": {"source": "a.jsonl", "fewshot": 5}}, "no examples apart from its questions"),
        ({"lambda": [5]}, "lambda"),
    ],
)
def test_mistakes(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as e:
        load(tmp_path, **more)
    assert "user:secret" not in str(e.value)
