"""A run's training on two ranks over which FSDP2 spreads the weights: what one process does, its guard included, also after a stop.

accelerate spreads weights over GPUs only; here its state says otherwise, and gloo does what NCCL would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

if __name__ != "__main__":
    from test_accelerate_run import config, gap, trained, weights
    from test_trainer import free_port

from spalign.pipeline import job as jobs
from spalign.pipeline.checkpoints import last_checkpoint
from spalign.pipeline.job import TrainJob, train_job
from spalign.store import read_json, write_json

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def ranks(folder: Path, stop_at: int) -> list[tuple[int, str]]:
    """Exit codes and outputs of two ranks that do the job of `folder`, and leave at that step."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **FSDP2}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(stop_at)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [p.communicate(timeout=240)[0] for p in started]
        return [(p.returncode, text) for p, text in zip(started, said, strict=True)]
    finally:
        for p in started:
            p.kill()


def test_two_sharded_ranks_train_what_one_process_does(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainJob] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("spalign.pipeline.train.train_job", lambda job, watch: (seen.append(job), train_job(job, watch))[1])
    alone = trained(config(tmp_path / "alone", tiny_model, together=False))
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_json(folder / "job.json", replace(seen[0], folder=folder, processes=2).to_json())

    assert [code for code, _ in ranks(folder, stop_at=3)] == [7, 7]  # of four steps; each is a checkpoint
    stopped = last_checkpoint(folder / "checkpoints")
    assert stopped is not None
    assert json.loads((stopped / "trainer_state.json").read_text())["global_step"] == 2
    for code, said in ranks(folder, stop_at=0):
        assert code == 0, said
    found: dict[str, Any] = read_json(folder / "result.json")
    log = json.loads((alone / "log.json").read_text())
    assert found["steps"] == 4
    assert found["before"] == pytest.approx(log["guard"]["before"], rel=1e-5)
    assert [p["chosen"] for p in found["probes"]] == pytest.approx([p["chosen"] for p in log["guard"]["probes"]], rel=1e-4)
    assert [p["kl"] for p in found["probes"]] == pytest.approx([p["kl"] for p in log["guard"]["probes"]], rel=1e-3, abs=1e-5)
    end = last_checkpoint(folder / "checkpoints")
    assert end is not None
    got = torch.cat([w.reshape(-1).double() for _, w in sorted(load_file(end / "model.safetensors").items())])
    assert gap(got, weights(alone)) < 1e-5
    assert found["whole_on"] == ["cpu"]


class _Watch:
    def __init__(self, stop_at: int) -> None:
        self.left = stop_at

    def begins(self, steps: int) -> None: ...

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os._exit(7)

    def saved(self) -> None: ...


def main(folder: Path, stop_at: int) -> None:
    from accelerate.state import DistributedType, PartialState

    from spalign.engines import loading

    make, load, whole_on = jobs._arguments, loading.load_model, set[str]()

    def arguments(*args: Any, **how: Any) -> Any:
        made = make(*args, **how)
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return made

    def noted(name: str, config: Any, **how: Any) -> Any:
        whole_on.add(config.device)
        return load(name, config, **how)

    jobs._arguments, loading.load_model = arguments, noted  # type: ignore[assignment]
    found = train_job(TrainJob.from_json(read_json(folder / "job.json")), _Watch(stop_at))
    if os.environ["RANK"] == "0":
        write_json(folder / "result.json", {**found, "whole_on": sorted(whole_on)})
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
