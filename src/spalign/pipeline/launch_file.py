"""The file that `train.accelerate` names: accelerate's own view of it, and what a run can do with it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spalign.config import RunConfig
from spalign.errors import ConfigError
from spalign.pipeline.job import accumulation
from spalign.text import printable

_SHARDED = ("FSDP", "DEEPSPEED")
"""Kinds that spread the weights over the processes."""


def processes_of(config: RunConfig) -> int:
    """How many processes train together."""
    return launch_file(config.train.accelerate).num_processes if config.train.accelerate else 1


def check_launch(config: RunConfig) -> None:
    """Raises ConfigError for a launch file that is missing or wrong, or whose processes cannot share a step."""
    path = config.train.accelerate
    if path is None:
        if re.fullmatch(r"cuda:0*[1-9]\d*", config.engine.device or ""):
            raise ConfigError(
                f"engine.device is {config.engine.device}: training takes the first GPU that it sees",
                hint="set it to cuda, and CUDA_VISIBLE_DEVICES to the GPU's number",
            )
        return
    file = launch_file(path)
    kind = file.distributed_type.value
    if kind not in ((*_SHARDED, "MULTI_GPU" if file.num_processes > 1 else "NO")):
        raise ConfigError(
            f"{path}: distributed_type is {kind}, and num_processes is {file.num_processes}",
            hint="for several processes, on CPUs too, set MULTI_GPU, FSDP or DEEPSPEED (on CPUs MULTI_GPU and use_cpu: true); for one, NO",
        )
    if file.num_machines > 1:
        raise ConfigError(f"{path}: num_machines is {file.num_machines}; a run trains on one machine", hint="set num_machines to 1")
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise ConfigError(f"{path}: DeepSpeed is not installed", hint="pip install deepspeed, or take configs/accelerate/fsdp2.yaml")
    fsdp, deepspeed = file.fsdp_config or {}, file.deepspeed_config or {}
    if kind == "FSDP" and fsdp.get("fsdp_state_dict_type") != "FULL_STATE_DICT":
        raise ConfigError(f"{path}: checkpoints would hold no whole weights", hint="set fsdp_state_dict_type to FULL_STATE_DICT")
    if kind == "FSDP" and str(fsdp.get("fsdp_version", 1)) != "2":
        raise ConfigError(f"{path}: FSDP of version 1, under which the guard cannot probe the model", hint="set fsdp_version to 2")
    if kind == "DEEPSPEED" and deepspeed.get("zero_stage") == 3 and not deepspeed.get("zero3_save_16bit_model"):
        raise ConfigError(f"{path}: checkpoints would hold no whole weights", hint="set zero3_save_16bit_model to true")
    if kind in _SHARDED and config.train.loss == "dpo":
        raise ConfigError(f"{path}: dpo's reference pass needs whole weights in every process", hint="take configs/accelerate/ddp.yaml")
    if kind in _SHARDED and config.train.attention == "flex":
        raise ConfigError(f"{path}: flex attention is tried on whole weights on a GPU first", hint="set train.attention=rows")
    if kind in _SHARDED and config.train.lora and config.train.lora.base_dtype == "nf4":
        raise ConfigError(f"{path}: a base in four bits is not spread over processes", hint="take configs/accelerate/ddp.yaml")
    _check_devices(config, path, file)
    accumulation(config, file.num_processes)


def _check_devices(config: RunConfig, path: str, file: Any) -> None:
    import torch

    from spalign.engines.loading import device_of

    if not device_of(config.engine).startswith("cuda"):
        if file.distributed_type.value in _SHARDED:
            raise ConfigError(f"{path}: accelerate spreads weights over GPUs only", hint="take a file like configs/accelerate/ddp.yaml")
    elif file.use_cpu:
        raise ConfigError(f"{path}: use_cpu is true, and engine.device is a GPU", hint="set use_cpu to false, or engine.device to cpu")
    elif file.num_processes > (there := torch.cuda.device_count()):
        raise ConfigError(f"{path}: num_processes is {file.num_processes}, and {there} GPUs are here", hint=f"set it to {there}")


def launch_file(path: str) -> Any:
    """accelerate's own view of the file."""
    if not Path(path).expanduser().is_file():
        raise ConfigError(f"train.accelerate: {path}: no such file", hint="give a file like configs/accelerate/ddp.yaml")
    if find_spec("accelerate") is None:
        raise ConfigError("train.accelerate needs accelerate", hint="pip install 'spalign[train]'")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        file = load_config_from_file(str(Path(path).expanduser()))
        if not isinstance(getattr(file, "num_processes", None), int) or file.num_processes < 1:
            raise ValueError("num_processes must be a whole number, at least 1")
    except Exception as e:  # unreadable, no mapping, unknown keys or kinds: whatever its own reader raises
        said = printable(str(e).splitlines()[0] if str(e) else type(e).__name__)
        raise ConfigError(f"train.accelerate: {path}: not a file of accelerate's: {said}", hint="write one with `accelerate config`") from e
    return file
