"""One of the processes that `spalign.pipeline.launch` starts through accelerate: `python -m spalign.pipeline.worker JOBFILE`."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from spalign.errors import SpalignError, TrainingError
from spalign.pipeline.job import TrainJob, train_job
from spalign.pipeline.launch import LOG, MARK, RESULT
from spalign.startup import slim
from spalign.store import read_json, write_json
from spalign.text import shorten


class _Told:
    """A `Watch` that tells the process which follows; only the first process does."""

    def __init__(self, rank: int) -> None:
        self._mark = os.environ[MARK] if rank == 0 else None

    def begins(self, steps: int) -> None:
        self._tell(f"begins {steps}")

    def step(self) -> None:
        self._tell("step")

    def saved(self) -> None:
        self._tell("saved")

    def _tell(self, what: str) -> None:
        if self._mark:
            sys.stdout.write(f"{self._mark} {what}\n")
            sys.stdout.flush()


def main(file: str) -> None:
    """Do the job. The result, or an error, lands beside the file."""
    slim()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    rank, folder = int(os.environ.get("RANK", "0")), Path(file).parent
    try:
        trained = train_job(_on_own_device(TrainJob.from_json(read_json(Path(file)))), _Told(rank))
        if rank == 0:
            write_json(folder / RESULT, trained)
    except Exception as e:
        traceback.print_exc()
        _fail(folder / f"error-{rank}.json", rank, e)
    _part()


def _on_own_device(job: TrainJob) -> TrainJob:
    from spalign.engines.loading import device_of

    if job.processes == 1 or not device_of(job.config.engine).startswith("cuda"):
        return job
    engine = job.config.engine.model_copy(update={"device": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"})
    return replace(job, config=job.config.model_copy(update={"engine": engine}))


def _end_with_the_parent() -> None:
    """Nothing is ever written to standard input: it ends when the pipeline's process does, however that ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _fail(file: Path, rank: int, e: Exception) -> None:
    """Leave the error, and leave at once: an orderly exit would wait for processes that wait for this one."""
    if not isinstance(e, SpalignError):
        e = TrainingError(
            f"process {rank} of the training failed: {type(e).__name__}: {shorten(str(e))}",
            hint=f"see {file.parent.parent / LOG}; the same command goes on from the last checkpoint",
        )
    try:
        write_json(file, {"kind": type(e).__name__, "message": e.message, "hint": e.hint, "at": time.time()})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _part() -> None:
    import torch

    gc.collect()  # trainer and model: DDP's reducer must not hold the group last, or its end waits forever
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
