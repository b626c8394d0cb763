"""One training: what it needs as plain data, and how it is done, by this process alone or by each of several at the same time."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from spalign.config import LoraConfig, RunConfig
from spalign.constitution import Constitution
from spalign.errors import ConfigError, RunFolderError
from spalign.pipeline.checkpoints import check_space, keep_weights, last_checkpoint
from spalign.pipeline.probe import JobProber
from spalign.pipeline.trackers import tracker_callbacks
from spalign.store import clear_errors
from spalign.types import Prompt, prompt_from_json


@dataclass(frozen=True, slots=True)
class TrainJob:
    """Everything that a training depends on.

    name: for trackers. model: what is trained, a name or a folder. folder: the stage's; checkpoints are in its `checkpoints`, from the last
    of which training goes on. rows: preference rows. prompts: the guard's. keep: checkpoints whose weights are kept, as in `keep_weights`.
    processes: that train together, each with the whole job; prompts_per_step counts the prompts of all.
    """

    config: RunConfig
    constitution: Constitution
    name: str
    model: str
    folder: Path
    rows: list[dict[str, Any]]
    prompts: list[Prompt]
    keep: int
    processes: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "constitution": self.constitution.model_dump(mode="json"),
            "name": self.name,
            "model": self.model,
            "folder": str(self.folder),
            "rows": self.rows,
            "prompts": [asdict(p) for p in self.prompts],
            "keep": self.keep,
            "processes": self.processes,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainJob:
        return cls(
            **{
                **data,
                "config": RunConfig.model_validate(data["config"]),
                "constitution": Constitution.model_validate(data["constitution"]),
                "folder": Path(data["folder"]),
                "prompts": [prompt_from_json(p) for p in data["prompts"]],
            }
        )


class Watch(Protocol):
    """Told how training goes: the steps to do, each of them, and every checkpoint."""

    def begins(self, steps: int) -> None: ...

    def step(self) -> None: ...

    def saved(self) -> None: ...


def accumulation(config: RunConfig, processes: int) -> int:
    """Forward passes a process makes for one optimiser step. Raises ConfigError where prompts_per_step is no multiple of a round of all."""
    train = config.train
    steps, rest = divmod(train.prompts_per_step, train.prompts_per_forward * processes)
    if rest:
        raise ConfigError(
            f"train.prompts_per_step {train.prompts_per_step} cannot be shared by {processes} processes with prompts_per_forward "
            f"{train.prompts_per_forward}",
            hint=f"it counts the prompts of all processes: make it a multiple of {train.prompts_per_forward * processes}",
        )
    return steps


def train_job(job: TrainJob, watch: Watch) -> dict[str, Any]:
    """Train to the end or to the guard's stop; what became of it, as plain data. The model is the last checkpoint.

    Every one of `job.processes` calls this: all build model, data and trainer, and make the same forward passes for the guard.
    """
    with clear_errors(job.folder):
        return _train(job, watch)


def _train(job: TrainJob, watch: Watch) -> dict[str, Any]:
    import torch

    from spalign.engines.loading import device_of, fast_bf16, load_model
    from spalign.training.guard import CollapseGuard
    from spalign.training.trainer import SPATrainer

    engine, train = job.config.engine, job.config.train
    device = device_of(engine)
    bf16 = fast_bf16(device) and engine.dtype != "float32"
    # before the processes know of each other: then transformers would give the weights to the first one only
    where = engine.model_copy(update={"device": "cpu"}) if spread() else engine  # no GPU is to hold them all
    model, tokenizer = load_model(job.model, where, dtype=_held_in(train.lora, device))
    check_space(model, job.folder, adapter=train.lora is not None, keep=job.keep)
    guard = CollapseGuard(JobProber(job, tokenizer, torch.bfloat16 if bf16 else None), train.guard)
    with _environment(job.folder, bf16):
        args = _arguments(job, on_cpu=device == "cpu", bf16=bf16)
        callbacks = [*tracker_callbacks(train.report_to), guard]
        trainer = SPATrainer(model, args, job.rows, tokenizer, peft_config=_lora(train.lora), callbacks=callbacks)
    if math.ceil(train.epochs * math.ceil(len(trainer.train_dataset) / train.prompts_per_step)) == 1:
        trainer.args.warmup_steps = 0  # the first step of a warm-up has a learning rate of 0: a single one would change nothing
    _fit(trainer, guard, job, watch)
    log = trainer.state.log_history
    return {
        "steps": int(trainer.state.global_step),
        "collapsed": guard.collapsed,
        "prompts": len(trainer.train_dataset),
        "history": [h for h in log if "loss" in h],
        "before": asdict(guard.before),
        "probes": [h for h in log if "repetition" in h],
    }


def spread() -> bool:
    """Whether accelerate's launcher has been told to spread the weights over the processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("true", "1") for kind in ("FSDP", "DEEPSPEED"))


@contextlib.contextmanager
def _environment(folder: Path, bf16: bool) -> Iterator[None]:
    """What accelerate and TensorBoard read when they are made.

    engine.dtype decides the precision, not the launcher's file. TensorBoard's own choice of a folder would go with the checkpoints.
    """
    before = dict(os.environ)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    try:
        yield
    finally:
        for name in ("ACCELERATE_MIXED_PRECISION", "TENSORBOARD_LOGGING_DIR"):
            del os.environ[name]
            os.environ.update({name: before[name]} if name in before else {})


def _arguments(job: TrainJob, *, on_cpu: bool, bf16: bool) -> Any:
    """With these made, the processes know of each other. Raises ConfigError where they are not as many as the job says."""
    from spalign.training.trainer import SPAConfig

    train = job.config.train
    args = SPAConfig(
        output_dir=str(job.folder / "checkpoints"),
        loss=train.loss,
        beta=train.beta,
        gamma=train.gamma,
        alpha=train.alpha,
        sft_weight=train.sft_weight,
        attention=train.attention,
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.prompts_per_forward,
        gradient_accumulation_steps=accumulation(job.config, job.processes),
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup_ratio,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=bf16,
        use_cpu=on_cpu,
        seed=job.config.seed,
        data_seed=job.config.seed,
        save_strategy="no",  # the guard asks for a checkpoint after every probe that passes
        save_total_limit=2,
        report_to="none",  # _trackers makes them
        run_name=job.name,
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    if args.world_size != job.processes:
        raise ConfigError(
            f"training is for {job.processes} processes, and {args.world_size} have found each other",
            hint="see num_processes in train.accelerate; on CPUs: distributed_type MULTI_GPU with use_cpu true",
        )
    return args


def _fit(trainer: Any, guard: Any, job: TrainJob, watch: Watch) -> None:
    from transformers import PrinterCallback, TrainerCallback

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.begins(state.max_steps - state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:  # which has written the checkpoint
                keep_weights(job.folder, job.keep)
            watch.saved()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Told)
    checkpoint = last_checkpoint(job.folder / "checkpoints")
    if checkpoint is not None:
        check_kind(checkpoint, trainer)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except FloatingPointError as e:
        guard.collapsed = str(e)


def check_kind(checkpoint: Path, trainer: Any) -> None:
    """Raises RunFolderError for a checkpoint of whole weights where they are sharded, and the other way round."""
    kinds = (
        ("FSDP", any(checkpoint.glob("pytorch_model_fsdp*")), trainer.is_fsdp_enabled),
        ("DeepSpeed", (checkpoint / "latest").exists(), trainer.is_deepspeed_enabled),
    )
    for kind, then, now in kinds:
        if then != now:
            raise RunFolderError(
                f"{checkpoint}: training began {'with' if then else 'without'} {kind}, and cannot go on {'with' if now else 'without'} it",
                hint=f"take the train.accelerate that it began with, or remove {checkpoint.parent} to train from the start",
            )


def _held_in(lora: LoraConfig | None, device: str) -> Any:
    """What the policy is loaded in: float32 where its weights train, because bf16 loses updates of 1e-5; a frozen base as configured."""
    import torch

    kind = "float32" if lora is None else lora.base_dtype
    if kind == "auto":
        kind = "float32" if device == "cpu" else "bfloat16"
    return kind if kind == "nf4" else getattr(torch, kind)


def _lora(lora: LoraConfig | None) -> Any:
    if lora is None:
        return None
    import peft

    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
