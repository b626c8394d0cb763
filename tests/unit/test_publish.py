"""What leaves a run: trackers and the hub are checked before, a failed push loses nothing, and the launch configs are accelerate's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from spalign.config import RunConfig, config_from
from spalign.errors import ConfigError
from spalign.pipeline.export import _EXTRA as EXTRA
from spalign.pipeline.publish import check_hub, check_outlets
from spalign.store import Stage

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


def config(*sets: str) -> RunConfig:
    return config_from({"name": "a"}, sets)


def test_a_tracker_must_be_known_and_installed():
    assert config().train.report_to == []
    assert config("train.report_to=wandb").train.report_to == ["wandb"]
    for name in ("wandboo", "all", "none"):
        with pytest.raises(ConfigError, match=f"there is no tracker '{name}'") as e:
            check_outlets(config(f"train.report_to=[{name}]"))
        assert "tensorboard" in e.value.hint
    with pytest.raises(ConfigError, match="neptune is not installed") as e:
        check_outlets(config("train.report_to=[neptune]"))
    assert e.value.hint.startswith("pip install neptune")


def test_a_run_with_an_unknown_tracker_leaves_no_folder(tmp_path):
    from spalign.pipeline import run

    with pytest.raises(ConfigError, match="no tracker"):
        run(config("train.report_to=wandboo", f"runs_dir={tmp_path}"))
    assert not list(tmp_path.iterdir())


def test_a_push_needs_its_key_in_the_environment_before_anything_runs(monkeypatch):
    wanted = config("train.push_to_hub=me/mine")
    for key in (None, " "):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if key is not None:
            monkeypatch.setenv("HF_TOKEN", key)
        with pytest.raises(ConfigError, match="no key in the environment"):
            check_outlets(wanted)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    check_outlets(wanted)


@pytest.mark.parametrize("repo", ["a/b/c", "me/", "../up", "me/ x", "https://hf.co/me/x", "", "x" * 97])
def test_a_repository_must_have_a_name_of_the_hub(repo):
    with pytest.raises(ConfigError):
        config_from({"name": "a", "train": {"push_to_hub": repo}})


def test_where_things_go_is_no_part_of_the_record():
    there = config("train.report_to=wandb", "train.push_to_hub=me/mine")
    assert there.on_record() == config().on_record()
    assert config("train.lora.dora=true").on_record() != config("train.lora.dora=false").on_record()


PUSH = """
import sys
from pathlib import Path
from spalign.errors import HubError
from spalign.pipeline.publish import push, push_data
try:
    print("pushed to", eval(sys.argv[2]))
except HubError as e:
    print(e)
    sys.exit(e.exit_code)
"""


MODEL = "push(Path(sys.argv[1]), 'me/mine', 'a run')"


def pushed(model: Path, endpoint: str, what: str = MODEL) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-W", "error", "-c", PUSH, str(model), what]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"# {name}\n")
    return tmp_path / "model"


def test_a_push_without_a_network_says_how_to_push_by_hand(model):
    with socket.socket() as s:  # a port that nobody listens on
        s.bind(("127.0.0.1", 0))
        done = pushed(model, f"http://127.0.0.1:{s.getsockname()[1]}")
    assert done.returncode == 2, done.stderr
    assert "the run is done and kept, and its model could not be pushed to 'me/mine': " in done.stdout
    assert f"hf upload me/mine {model} . --private" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


class Hub(BaseHTTPRequestHandler):
    """The few answers that a push of small files needs, in the hub's words; what was asked is kept."""

    asked: list[tuple[str, str | None, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        values = [json.loads(line) for line in body.splitlines()]
        self.asked.append((self.path, self.headers["Authorization"], values))
        host = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self._answer({"url": f"{host}/me/mine", "id": "me/mine", "name": "me/mine"})
        elif "/preupload/" in self.path:
            self._answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in values[0]["files"]]})
        else:
            self._answer({"commitUrl": f"{host}/me/mine/commit/0", "commitOid": "0" * 40, "success": True, "valid": True, "warnings": []})

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[Any]]]:
    asked: list[Any] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("_Hub", (Hub,), {"asked": asked})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_a_push_makes_a_private_repository_with_the_model_and_its_adapter(model, hub):
    endpoint, asked = hub
    done = pushed(model, endpoint)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout == f"pushed to {endpoint}/me/mine\n"
    created = next(values[0] for path, _, values in asked if path == "/api/repos/create")
    assert (created["name"], created["organization"]) == ("mine", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    commits = [values for path, _, values in asked if "/commit/" in path]
    files = [v["value"]["path"] for values in commits for v in values if v["key"] == "file"]
    assert files == ["README.md", "adapter/README.md"]
    assert {key for _, key, _ in asked} == {"Bearer hf_secret"}


def test_data_are_pushed_as_a_private_data_set(model, hub):
    endpoint, asked = hub
    done = pushed(model, endpoint, "push_data(Path(sys.argv[1]), 'me/pairs')")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    created = next(values[0] for path, _, values in asked if path == "/api/repos/create")
    assert created["type"] == "dataset"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert [path for path, _, _ in asked if "/commit/" in path] == ["/api/datasets/me/mine/commit/main"]


@pytest.mark.parametrize(
    ("repo", "said"), [("a b", "no name on the hub"), ("x/" + "y" * 99, "no name on the hub"), ("me/pairs", "HF_TOKEN")]
)
def test_a_data_set_needs_a_name_and_a_key(monkeypatch, repo, said):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=said):
        check_hub(repo, "--push-to-hub")


def small_run(folder: Path) -> Path:
    """A run of one pair, as the pipeline leaves it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "x", "model": "org/model", "prompts": {"train": {"source": "set"}}}))
    (folder / "constitution.yaml").write_text(yaml.safe_dump({"name": "good", "objectives": [{"name": "harm"}]}))
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    stage = Stage(folder / "iteration-1/5-pair", {})
    stage.begin()
    stage.write_part(0, [{"prompt": [{"role": "user", "content": "Hi"}], **sides, **dict.fromkeys(EXTRA, "x")}])
    stage.finish(funnel={})
    return folder


def test_export_pushes_what_it_wrote_and_nothing_is_written_without_a_key(tmp_path, hub):
    run, (endpoint, asked) = small_run(tmp_path / "run"), hub
    command = [sys.executable, "-m", "spalign.cli", "export", str(run), "out", "--push-to-hub", "me/pairs"]
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "no key in the environment (HF_TOKEN)" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not asked
    keyed = {**env, "HF_TOKEN": "hf_secret"}
    done = subprocess.run(command, cwd=tmp_path, env=keyed, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {endpoint}/me/mine" in done.stdout
    commits = [values for path, _, values in asked if "/commit/" in path]
    assert sorted(v["value"]["path"] for values in commits for v in values if v["key"] == "file") == ["README.md", "pairs.jsonl"]
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_launch_configs_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = CONFIGS / f"{name}.yaml"
    loaded = load_config_from_file(str(path))  # refuses unknown keys at the top
    assert (loaded.num_processes, loaded.num_machines, loaded.mixed_precision, loaded.use_cpu) == (8, 1, "bf16", False)
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    assert loaded.distributed_type.value == kind
    flags = vars(launch_command_parser().parse_args(["--config_file", str(path), "script.py"]))
    assert set(loaded.fsdp_config) | set(loaded.deepspeed_config) <= set(flags)  # and what is below them is an option of the launcher
    if name == "fsdp2":
        from accelerate.utils.constants import FSDP_AUTO_WRAP_POLICY, FSDP_STATE_DICT_TYPE

        fsdp = loaded.fsdp_config
        assert (fsdp["fsdp_version"], fsdp["fsdp_reshard_after_forward"]) == (2, True)
        assert fsdp["fsdp_auto_wrap_policy"] in FSDP_AUTO_WRAP_POLICY
        assert fsdp["fsdp_state_dict_type"] in FSDP_STATE_DICT_TYPE
    if name == "zero3":
        assert loaded.deepspeed_config["zero_stage"] == 3
        assert loaded.deepspeed_config["zero3_save_16bit_model"] is True


def test_every_launch_config_is_tested():
    assert {p.stem for p in CONFIGS.iterdir()} == {"ddp", "fsdp2", "zero3"}
