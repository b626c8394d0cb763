"""6-train: from pairs to a model, with the collapse guard; resumable from its checkpoints."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spalign.errors import NothingToTrainOn, RunFolderError
from spalign.evaluation import repetition
from spalign.pipeline.context import Context, Policy, Step
from spalign.report.terminal import print_funnel
from spalign.store import Stage, clear_errors, read_json, write_json
from spalign.types import Prompt


def train_step(run: Context, base: str, policy: Policy, paired: Stage, prompts: Sequence[Prompt]) -> Step:
    """Trains `policy` on the pairs of `paired`; the model lands in `6-train/model`, safetensors only."""
    inputs = {"from": paired.digest, "policy": policy.digest, "train": run.config.train.model_dump(), "seed": run.config.seed}
    stage = run.folder.stage(f"{base}/6-train", inputs)

    def do() -> dict[str, Any]:
        funnel = (paired.manifest() or {})["funnel"]
        if not funnel["pairs"]:
            if not run.ui.quiet:
                print_funnel(funnel, run.ui.console)
            raise NothingToTrainOn("no preference pair is left, so nothing is trained", hint=advice(funnel))
        progress = stage.begin()
        began = time.perf_counter()

        def seconds() -> float:
            return round(float(progress["seconds"]) + time.perf_counter() - began, 3)

        def saved() -> None:
            stage.note(seconds=seconds(), tokens=0)

        with clear_errors(stage.folder):
            facts = (read_json(stage.folder / "log.json") or {}).get("result")  # written last: training is over, only the rest is missing
            if facts is None:
                for other in (policy, run.named_judge, run.reference_judge):  # the trainer loads the weights in float32
                    if other is not None:
                        other.free()
                facts = _train(run, base, policy, list(paired.rows()), prompts, stage.folder, saved)
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
        return stage.finish(seconds=seconds(), **facts)

    return Step("train", stage, do)


def advice(funnel: dict[str, Any]) -> str:
    """What to change, from where the prompts went."""
    dropped = funnel["dropped"]
    if not dropped:
        return "lower pairs.delta"
    worst = max(dropped, key=dropped.get)
    fixes = {
        "truncated": "raise sample.max_new_tokens, or ask for brevity with prompts.suffix",
        "empty": "check the model's chat template and its answers in 1-sample",
        "unscored": "the model gives no usable score: use self_evaluation.scorer=yes_no, or a larger model",
        "ceiling": "the judge gives top marks to everything: use self_evaluation.scorer=yes_no, or denoise.consistency=above_mean",
        "not dominating": "use denoise.consistency=above_mean, more refine.drafts, or refine.style=principled",
        "uninformative": "the judge says the same of every candidate: use self_evaluation.scorer=yes_no, or a higher sample.temperature",
        "unstable": "raise denoise.tau",
        "below margin": "lower pairs.delta",
    }
    return f"{dropped[worst]} of {funnel['prompts']} prompts left as '{worst}': {fixes[worst]}"


def _train(
    run: Context,
    base: str,
    policy: Policy,
    rows: list[dict[str, Any]],
    prompts: Sequence[Prompt],
    folder: Path,
    saved: Callable[[], None],
) -> dict[str, Any]:
    """Train, hand the model over, and write log.json; what of it goes into the manifest. `saved` is called after every checkpoint."""
    import torch

    from spalign.engines.loading import device_of, fast_bf16, load_model
    from spalign.training.guard import CollapseGuard
    from spalign.training.trainer import SPAConfig, SPATrainer

    train = run.config.train
    device = device_of(run.config.engine)
    bf16 = fast_bf16(device) and run.config.engine.dtype != "float32"
    model, tokenizer = load_model(policy.name, run.config.engine, dtype=torch.float32)
    _check_space(model, folder, adapter=train.lora is not None)
    probe = _probe(run, tokenizer, prompts, torch.bfloat16 if bf16 else None)
    before = probe(model)
    guard = CollapseGuard(probe, before, train.guard)
    args = SPAConfig(
        output_dir=str(folder / "checkpoints"),
        beta=train.beta,
        gamma=train.gamma,
        alpha=train.alpha,
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.prompts_per_forward,
        gradient_accumulation_steps=train.prompts_per_step // train.prompts_per_forward,
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup_ratio,
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=train.gradient_checkpointing,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=run.config.seed,
        data_seed=run.config.seed,
        save_strategy="no",  # the guard asks for a checkpoint after every probe that passes
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
    )
    trainer = SPATrainer(model, args, rows, tokenizer, peft_config=_lora(run), callbacks=[guard])
    steps = _fit(trainer, guard, run, base, _last_checkpoint(folder / "checkpoints"), saved)
    best = _last_checkpoint(folder / "checkpoints")
    if best is None:
        raise NothingToTrainOn(
            f"training collapsed before its first checkpoint ({guard.collapsed}); no model is handed over",
            hint="lower train.learning_rate, or set train.guard.every_steps lower to keep an earlier checkpoint",
        )
    _hand_over(best, folder, policy, run, tokenizer)
    history = [h for h in trainer.state.log_history if "loss" in h]
    probes = [h for h in trainer.state.log_history if "repetition" in h]
    result = {
        "model": str(folder / "model"),
        "steps": steps,
        "steps_kept": int(best.name.removeprefix("checkpoint-")),
        "collapsed": guard.collapsed,
        "prompts": len(trainer.train_dataset),
        "loss": [history[0]["loss"], history[-1]["loss"]] if history else [],
        "accuracy": [history[0]["pairs/accuracy"], history[-1]["pairs/accuracy"]] if history else [],
    }
    write_json(folder / "log.json", {"result": result, "steps": history, "guard": {"before": asdict(before), "probes": probes}})
    return result


def _fit(trainer: Any, guard: Any, run: Context, base: str, checkpoint: Path | None, saved: Callable[[], None]) -> int:
    """Train to the end or to the guard's stop; the number of steps done."""
    from transformers import PrinterCallback, TrainerCallback

    class Ticker(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tick(1)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Ticker)
    per_step = trainer.args.gradient_accumulation_steps * trainer.args.per_device_train_batch_size
    total = -(-len(trainer.train_dataset) // per_step) * trainer.args.num_train_epochs
    with run.ui.stage(f"{base} train", round(total), "steps") as tick:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except FloatingPointError as e:
            guard.collapsed = str(e)
    return int(trainer.state.global_step)


def _probe(run: Context, tokenizer: Any, prompts: Sequence[Prompt], autocast: Any) -> Callable[[Any], Any]:
    """The guard's probe: the model in training answers a few training prompts, always the same and with the same seeds."""
    from spalign.engines.transformers import TransformersEngine
    from spalign.rollout import sample
    from spalign.training.guard import Probe

    few = list(prompts[:: max(1, len(prompts) // run.config.train.guard.prompts)])[: run.config.train.guard.prompts]
    bare = run.constitution.bare()
    config = run.config.sample.model_copy(update={"n": 1})

    def probe(model: Any) -> Probe:
        training = model.training
        model.eval()
        engine = TransformersEngine(getattr(model, "module", model), tokenizer, batch_size=run.config.engine.batch_size)
        engine.autocast = autocast
        answers = [r for g in sample(engine, few, bare, config, seed=run.config.seed, purpose="probe") for r in g.candidates]
        model.train(training)
        n = len(answers)
        return Probe(
            words=sum(r.words for r in answers) / n,
            repetition=sum(repetition(r.text) for r in answers) / n,
            empty=sum(not r.text.strip() for r in answers) / n,
        )

    return probe


def _lora(run: Context) -> Any:
    lora = run.config.train.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target_modules, task_type="CAUSAL_LM")


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; trainer_state.json is what transformers writes last."""
    found = []
    for p in folder.glob("checkpoint-*"):
        with contextlib.suppress(RunFolderError):  # torn by a kill
            if read_json(p / "trainer_state.json"):
                found.append(p)
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


def _hand_over(checkpoint: Path, folder: Path, policy: Policy, run: Context, tokenizer: Any) -> None:
    """The checkpoint's model as `model/` (and `adapter/` where one was trained, merged into `model/`)."""
    import torch

    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    if (checkpoint / "adapter_config.json").exists():
        from peft import PeftModel

        from spalign.engines.loading import load_model

        model, _ = load_model(policy.name, run.config.engine.model_copy(update={"device": "cpu"}), dtype=torch.float32)
        merged = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
        merged.save_pretrained(target)
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        (folder / "adapter").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(checkpoint / name, folder / "adapter" / name)
    else:
        target.mkdir()
        for file in checkpoint.iterdir():  # copied, not moved: the checkpoint stays whole until the stage is done
            if file.suffix in {".safetensors", ".json"} and file.name != "trainer_state.json":
                shutil.copy2(file, target / file.name)
    tokenizer.save_pretrained(target)


def _check_space(model: Any, folder: Path, *, adapter: bool) -> None:
    """Refuse to begin where the checkpoints (weights and two moments, twice; of an adapter next to nothing) and the model cannot fit."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    need = (1.2 if adapter else 7) * weights - there
    free = shutil.disk_usage(folder).free
    if free < need:
        raise RunFolderError(
            f"{folder}: training needs up to {need / 1e9:.1f} GB for checkpoints, {free / 1e9:.1f} GB are free",
            hint="free some space, or choose another runs_dir; everything finished is kept",
        )
