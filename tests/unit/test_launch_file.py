"""`train.accelerate`: what is wrong with a launch file is said before a run, with what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from spalign.config import config_from
from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.job import accumulation, check_kind
from spalign.pipeline.launch_file import check_launch, processes_of

TWO = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": True, "num_machines": 1, "num_processes": 2}
SHIPPED = Path(__file__).parents[2] / "configs" / "accelerate"


def config(path: object, *, device: str = "cpu", **train: Any) -> Any:
    return config_from({"name": "x", "model": "m", "engine": {"device": device}, "train": {"accelerate": str(path), **train}})


def written(folder: Path, content: object) -> Path:
    path = folder / "launch.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_right_file_passes(tmp_path):
    found = config(written(tmp_path, TWO), prompts_per_step=8, prompts_per_forward=2)
    check_launch(found)
    assert processes_of(found) == 2
    assert accumulation(found, 2) == 2  # 8 prompts = 2 processes x 2 prompts x 2 passes
    assert processes_of(config_from({"name": "x", "model": "m"})) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a file of accelerate's"),
        ("- a", "not a file of accelerate's"),
        ("", "not a file of accelerate's"),
        ({**TWO, "colour": "red\x1b[2J"}, "not a file of accelerate's: .*colour"),
        ({**TWO, "distributed_type": "MANY"}, "not a file of accelerate's"),
        ({**TWO, "num_processes": 0}, "num_processes must be a whole number"),
        ({**TWO, "num_processes": "two"}, "num_processes must be a whole number"),
        ({**TWO, "num_processes": 1}, "distributed_type is MULTI_GPU, and num_processes is 1"),
        ({**TWO, "distributed_type": "NO"}, "distributed_type is NO, and num_processes is 2"),
        ({**TWO, "distributed_type": "MULTI_CPU"}, "distributed_type is MULTI_CPU"),
        ({**TWO, "num_machines": 2}, "num_machines is 2"),
        ({**TWO, "num_processes": 3}, "prompts_per_step 8 cannot be shared by 3 processes with prompts_per_forward 1"),
        ({**TWO, "distributed_type": "FSDP", "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}, "no whole weights"),
        ({**TWO, "distributed_type": "FSDP", "fsdp_config": {"fsdp_state_dict_type": "FULL_STATE_DICT"}}, "FSDP of version 1"),
        (
            {**TWO, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"}},
            "over GPUs only",
        ),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as e:
        check_launch(config(path, prompts_per_step=8))
    assert str(path) in e.value.message or "prompts_per_step" in e.value.message
    assert e.value.hint
    assert e.value.message.isprintable()


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        check_launch(config(tmp_path / "none.yaml"))


def test_dpo_needs_whole_weights():
    with pytest.raises(ConfigError, match="dpo's reference pass"):
        check_launch(config(SHIPPED / "fsdp2.yaml", loss="dpo"))


def test_flex_attention_is_tried_on_whole_weights():
    with pytest.raises(ConfigError, match="flex attention is tried on whole weights"):
        check_launch(config(SHIPPED / "fsdp2.yaml", attention="flex"))


def test_one_process_trains_on_the_first_gpu_that_it_sees():
    for device, refused in (("cuda:1", True), ("cuda:0", False), ("cuda", False), ("auto", False)):
        alone = config_from({"name": "x", "model": "m", "engine": {"device": device}})
        if refused:
            with pytest.raises(ConfigError, match=r"engine\.device is cuda:1") as e:
                check_launch(alone)
            assert "CUDA_VISIBLE_DEVICES" in e.value.hint
        else:
            check_launch(alone)


def test_deepspeed_must_be_there(monkeypatch):
    monkeypatch.setattr("spalign.pipeline.launch_file.find_spec", lambda name: None if name == "deepspeed" else name)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed"):
        check_launch(config(SHIPPED / "zero3.yaml"))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_shipped_files_suit_a_machine_of_eight_gpus(monkeypatch, name):
    import torch

    monkeypatch.setattr("spalign.pipeline.launch_file.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("spalign.engines.loading.device_of", lambda _: "cuda")
    check_launch(config(SHIPPED / f"{name}.yaml", device="cuda", prompts_per_step=16))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match="num_processes is 8, and 4 GPUs are here"):
        check_launch(config(SHIPPED / f"{name}.yaml", device="cuda", prompts_per_step=16))


@pytest.mark.parametrize(
    ("made", "fsdp", "deepspeed", "message"),
    [
        ("trainer_state.json", False, False, None),
        ("trainer_state.json", True, False, "began without FSDP, and cannot go on with it"),
        ("pytorch_model_fsdp_0", True, False, None),
        ("pytorch_model_fsdp_0", False, False, "began with FSDP, and cannot go on without it"),
        ("latest", False, False, "began with DeepSpeed, and cannot go on without it"),
        ("latest", False, True, None),
    ],
)
def test_sharded_checkpoints_go_on_sharded(tmp_path, made, fsdp, deepspeed, message):
    (tmp_path / made).touch()
    trainer = SimpleNamespace(is_fsdp_enabled=fsdp, is_deepspeed_enabled=deepspeed)
    if message is None:
        check_kind(tmp_path, trainer)
    else:
        with pytest.raises(RunFolderError, match=message):
            check_kind(tmp_path, trainer)
