"""Training in two processes that the real launcher starts: the same result as one process gives, and clear ends of all that can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_pipeline import data_stages, engine, settings

from spalign.config import RunConfig, config_from
from spalign.errors import ConfigError, NothingToTrainOn, TrainingError
from spalign.pipeline import run

TWO = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # what accelerate calls several processes on one machine
    "use_cpu": True,
    "num_machines": 1,
    "machine_rank": 0,
    "num_processes": 2,
    "mixed_precision": "bf16",  # engine.dtype overrules it
}
NO_LIMITS = {"prompts": 1, "every_steps": 1, "max_length_ratio": 1e9, "max_repetition_rise": 1, "max_kl": 1e9, "max_chosen_drop": 1e9}
HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202egone"
KEY = "sk-0123456789"


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def launch_file(folder: Path) -> str:
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(TWO))
    return str(path)


def config(folder: Path, model: Path, together: bool = True, **train: Any) -> RunConfig:
    """Five prompts in steps of four: an epoch's second step has one prompt, for one process of two; a checkpoint after every step."""
    folder.mkdir(exist_ok=True)
    train = {"epochs": 2, "prompts_per_step": 4, "learning_rate": 1e-3, "accelerate": launch_file(folder) if together else None, **train}
    return settings(folder, model, ["keep"] * 5, train={"guard": NO_LIMITS, **train})


def trained(config: RunConfig) -> Path:
    """Stages 1 to 5 by the scripted engine, then 6; the training's folder."""
    data_stages(config)
    run(config, only="train", make_engine=engine)
    return config.folder / "iteration-1/6-train"


def weights(stage: Path) -> torch.Tensor:
    return torch.cat([w.reshape(-1).double() for _, w in sorted(load_file(stage / "model/model.safetensors").items())])


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "spalign.pipeline.worker" in " ".join(p.cmdline())]


def end_of(what: Callable[[], Any], seconds: float = 60) -> bool:
    """Whether `what` becomes false in this time."""
    last = time.monotonic() + seconds
    while what() and time.monotonic() < last:
        time.sleep(0.1)
    return not what()


# -- the same result --------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_does(tmp_path, tiny_model):
    alone = trained(config(tmp_path / "alone", tiny_model, together=False))
    together = trained(config(tmp_path / "together", tiny_model))
    start = torch.cat([w.reshape(-1).double() for _, w in sorted(load_file(tiny_model / "model.safetensors").items())])
    assert gap(weights(alone), start) > 1e-3  # it moved
    assert gap(weights(together), weights(alone)) < 1e-5
    one, two = (json.loads((s / "log.json").read_text()) for s in (alone, together))
    assert [s["step"] for s in two["steps"]] == [1, 2, 3, 4]
    for a, b in zip(one["steps"], two["steps"], strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "pairs/accuracy", "pairs/margin", "logps/chosen", "length/rejected"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name
    assert two["guard"]["before"] == pytest.approx(one["guard"]["before"], rel=1e-5)
    assert [p["chosen"] for p in two["guard"]["probes"]] == pytest.approx([p["chosen"] for p in one["guard"]["probes"]], rel=1e-4)
    assert {**two["result"], "model": "", "loss": []} == {**one["result"], "model": "", "loss": []} | {
        "accuracy": two["result"]["accuracy"]
    }
    assert not (together / "launch").exists()
    assert not (together / "checkpoints").exists()
    assert not children()


# -- kills ------------------------------------------------------------------------------------------------------------


def cli(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spalign.cli", "train", "run.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell starts with Ctrl-C ignored, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def test_whatever_is_killed_training_goes_on_from_its_last_checkpoint(tmp_path, tiny_model):
    lora = {"lora": {"r": 4}, "epochs": 5}  # 10 steps; every session but the last is ended after its first checkpoint
    alone = trained(config(tmp_path / "alone", tiny_model, together=False, **lora))
    killed = config(tmp_path / "killed", tiny_model, **lora)
    stage = data_stages(killed) / "6-train"
    (tmp_path / "killed/run.yaml").write_text(yaml.safe_dump(killed.model_dump(mode="json")))

    def session(end: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
        process = cli(tmp_path / "killed")
        old = set(stage.glob("checkpoints/*/trainer_state.json"))
        try:
            while process.poll() is None and set(stage.glob("checkpoints/*/trainer_state.json")) <= old:
                time.sleep(0.005)
            mine = children()
            assert len(mine) >= 3  # the launcher and its two
            end(process)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
        assert end_of(lambda: any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in mine)), [p.cmdline() for p in mine]
        assert stage.joinpath("checkpoints").is_dir()
        assert "Traceback" not in err
        return process.returncode, err

    def kill_one(process: subprocess.Popen[str]) -> None:
        next(p for p in children() if p.environ().get("RANK") == "1").kill()

    assert session(lambda p: p.kill())[0] == -signal.SIGKILL
    code, err = session(lambda p: p.send_signal(signal.SIGINT))
    assert code == 130
    assert "goes on" in err
    code, err = session(kill_one)
    assert code == 2
    # its companion may have time to say that the connection is gone
    assert "the processes that train ended with code 1" in err or "process 0 of the training failed" in err
    assert "the same command goes on from the last checkpoint" in err
    last = cli(tmp_path / "killed")
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert gap(weights(stage), weights(alone)) < 1e-5
    one, two = (json.loads((s / "log.json").read_text()) for s in (alone, stage))
    assert [s["step"] for s in two["steps"]] == list(range(1, 11))
    assert [s["loss"] for s in two["steps"]] == pytest.approx([s["loss"] for s in one["steps"]], rel=1e-4)


# -- training that fails ----------------------------------------------------------------------------------------------


def service(folder: Path, log: str, monkeypatch: pytest.MonkeyPatch, at_import: str = "") -> None:
    """Trackio's package, whose service does `log` when it is told of a step. Its callback is transformers' own."""
    package = folder / "packages/trackio"
    package.mkdir(parents=True)
    text = f"""
        import os, sys
        from contextvars import ContextVar
        from types import SimpleNamespace
        {at_import}
        __version__ = "0.1"
        context_vars = SimpleNamespace(current_space_id=ContextVar("space", default=None))
        config = {{}}
        def init(**kwargs): pass
        def finish(): pass
        def log(values):
            if values.get("train/global_step") == 3 and not os.path.exists("{folder}/mended"):
                {log}
        """
    (package / "__init__.py").write_text("\n".join(line[8:] for line in text.splitlines()))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SERVICE_KEY", KEY)
    # Set before it is taken away: a name that was never there would not be taken away again after the test.
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delitem(sys.modules, "trackio")


@pytest.mark.parametrize("together", [False, True])
def test_a_tracker_that_fails_is_named_and_training_goes_on_without_it_or_when_it_is_mended(tmp_path, tiny_model, monkeypatch, together):
    service(tmp_path, f"raise ConnectionError({'the service is away ' + HOSTILE + KEY!r})", monkeypatch)
    first = config(tmp_path, tiny_model, together, report_to="trackio")
    with pytest.raises(TrainingError, match="the tracker 'trackio' failed") as e:
        trained(first)
    assert e.value.exit_code == 2
    assert "the service is away" in e.value.message
    assert KEY not in e.value.message
    assert "[SERVICE_KEY]" in e.value.message
    assert e.value.message.isprintable()
    stage = first.folder / "iteration-1/6-train"
    assert [p.name for p in stage.glob("checkpoints/*")]
    kept = max(int(p.name.removeprefix("checkpoint-")) for p in stage.glob("checkpoints/*"))
    assert kept >= 2  # the tracker was told of step 3 before its checkpoint or after
    assert not children()
    (tmp_path / "mended").touch()
    again = config_from(first.model_dump(), ("train.report_to=[]",)) if together else first
    run(again, only="train", mode="resume", make_engine=engine)
    log = json.loads((stage / "log.json").read_text())
    assert [s["step"] for s in log["steps"]] == [1, 2, 3, 4]
    assert log["result"]["steps_kept"] == 4
    everything = b"".join(p.read_bytes() for p in first.folder.rglob("*") if p.is_file())
    assert KEY.encode() not in everything


def test_the_last_words_of_a_process_that_dies_are_shown_without_control_characters(tmp_path, tiny_model, monkeypatch):
    words = f"sys.stderr.write({f'no memory {HOSTILE} {KEY}'!r}); sys.stderr.flush(); os._exit(7)"
    service(tmp_path, "pass", monkeypatch, at_import=words)
    with pytest.raises(TrainingError, match="the processes that train ended with code 1") as e:
        trained(config(tmp_path, tiny_model, report_to="trackio"))
    assert "no memory" in e.value.message
    assert "failed (exitcode: 7)" in e.value.message.splitlines()[-1]
    assert "ChildFailedError" not in e.value.message  # the launcher's traceback
    assert all(line.isprintable() for line in e.value.message.splitlines())
    assert KEY not in e.value.message
    assert not children()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guard": {**NO_LIMITS, "every_steps": 4, "max_kl": 1e-9}}, "drift: KL"),
        ({"learning_rate": 1e30, "guard": {**NO_LIMITS, "every_steps": 4}}, "loss is nan at step 3, in rows"),
    ],
)
def test_all_processes_stop_where_the_guard_or_a_number_stops_one(tmp_path, tiny_model, changes, message):
    with pytest.raises(NothingToTrainOn, match=rf"collapsed before its first checkpoint \({message}"):
        trained(config(tmp_path, tiny_model, **changes))
    assert not children()


def test_a_wrong_launch_file_is_refused_before_anything_runs(tmp_path, tiny_model):
    wrong = config(tmp_path, tiny_model, prompts_per_step=5)
    with pytest.raises(ConfigError, match=r"train.prompts_per_step 5 cannot be shared by 2 processes"):
        run(wrong, make_engine=lambda _: pytest.fail("the run has begun"))
    assert not wrong.folder.exists()
