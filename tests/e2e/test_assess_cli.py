"""`spalign judge`, `experiment` and `soup` from outside: Ctrl-C in the middle of judging, a second run, dry runs, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'spalign[eval]'")

from model_server import ModelServer, Scripted

HOSTILE = "\x1b[2J <script>alert(1)</script> | [red]x[/red]"


@pytest.fixture
def lay(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    def lay(url: str = "http://localhost:9/v1", **more: Any) -> Path:
        rows = [{"id": f"p{i}", "prompt": f"question {i} {HOSTILE}", "intent": "legitimate"} for i in range(8)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = {
            "name": "e", "models": {"vanilla": str(tiny_model)}, "prompts": {"source": "prompts.jsonl"}, "check": 0,
            "judge": {"model": "openai-api/local/served", "base_url": url, "connections": 1},
            "engine": {"dtype": "float32"}, "answer": {"max_new_tokens": 8}, "bootstrap": 100,
        }  # fmt: skip
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump({**data, **more}))
        return tmp_path

    return lay


def test_ctrl_c_while_judging_and_the_same_command_again(lay: Callable[..., Path], environment: dict[str, str]) -> None:
    env = {**environment, "LOCAL_API_KEY": "sk-e2e-secret-value"}
    command = [sys.executable, "-m", "spalign.cli", "judge", "eval.yaml", "--json"]
    stopped = threading.Event()

    def answer(messages: Any, seed: int) -> str:
        if len(server.requests) >= 6:
            stopped.wait(120)  # however slow the machine is, the command is stopped in the middle
        return f"{HOSTILE}\nScore: 7"

    with ModelServer(Scripted(answer), names=("served",)) as server:
        folder = lay(server.url)
        first = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a job in the background of a shell starts with Ctrl-C ignored, and its children with it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )
        try:
            deadline = time.monotonic() + 120
            while len(server.requests) < 6 and time.monotonic() < deadline:
                time.sleep(0.05)
            first.send_signal(signal.SIGINT)
            out, err = first.communicate(timeout=60)
        finally:
            first.kill()
        assert first.returncode == 130, err
        assert "Traceback" not in out + err
        assert "the same command goes on" in err
        assert len(server.requests) == 6
        stopped.set()
        second = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert second.returncode == 0, second.stderr
        assert len(server.requests) <= 16 + 4  # what was under way is asked again, and at most what Inspect had not flushed
    found = json.loads(second.stdout.splitlines()[-1])
    assert found["scores"]["vanilla"]["harmlessness"]["all"]["mean"]["mean"] == 7.0
    shown = second.stdout + second.stderr + (folder / "runs/e/table.md").read_text()
    assert "\x1b" not in shown
    assert "sk-e2e-secret-value" not in shown + out + err
    third = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert third.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"models": {"vanilla": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"judge": {"model": "nobody/x"}}, "the judge 'nobody/x' cannot be used"),
        ({"prompts": {"source": "gone.jsonl"}}, "gone.jsonl"),
        ({"mt_bench": {"source": "gone.jsonl"}}, "gone.jsonl: no such file"),
        ({"lambda": [5]}, "lambda"),
    ],
)
def test_mistakes(
    spalign: Callable[..., Any], lay: Callable[..., Path], more: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "LOCAL_API_KEY", "x")
    done = spalign(lay(**more), "judge", "eval.yaml")
    assert done.code == 2, done.out + done.err
    assert says in done.err
    assert "fix:" in done.err
    assert not list(lay().glob("runs/e/**/part-*"))


def test_experiments_say_what_they_take_and_what_there_is(spalign: Callable[..., Any], tmp_path: Path) -> None:
    done = spalign(tmp_path, "experiment", "table1", "--scale", "demo", "--dry-run")
    assert done.code == 0, done.err
    assert "trainings: at most 8" in done.out  # four arms, two seeds
    assert not (tmp_path / "runs").exists()
    for args, says in (
        (("table9",), "one of: figure3"),
        (("table1", "--scale", "huge"), "one of: full, demo"),
        (("table1", "--scale", "demo", "--set", "seeds=[]"), "seeds"),
        (("table1", "--scale", "demo", "--set", "run.sample.n=1", "--dry-run"), "sample.n"),
        (("own.yaml",), "no experiment 'own.yaml'"),
    ):
        wrong = spalign(tmp_path, "experiment", *args)
        assert wrong.code == 2, wrong.out
        assert says in wrong.err


def test_a_soup_of_what_is_none(spalign: Callable[..., Any], tmp_path: Path, tiny_model: Path) -> None:
    assert spalign(tmp_path, "soup", "nowhere", str(tiny_model), "out").code == 2
    assert spalign(tmp_path, "soup", str(tiny_model), str(tiny_model), "out", "--ratio", "x").code == 2
    made = spalign(tmp_path, "soup", str(tiny_model), str(tiny_model), "out", "--ratio", "6:4")
    assert made.code == 0, made.err
    assert (tmp_path / "out/model.safetensors").exists()
