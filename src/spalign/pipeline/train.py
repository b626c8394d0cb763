"""6-train: from pairs to a model, with the collapse guard; resumable from its checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spalign.config import OUTLETS, LoraConfig
from spalign.errors import NothingToTrainOn, RunFolderError
from spalign.evaluation import repetition
from spalign.pipeline.context import Context, Policy, Step
from spalign.report.terminal import print_funnel
from spalign.store import Stage, clear_errors, read_json, write_json
from spalign.types import Prompt

KEPT = "kept"
"""Beside `checkpoints`, which ends with training: the weights of the last ones, until the priority gate has passed."""


def train_step(run: Context, base: str, policy: Policy, paired: Stage, prompts: Sequence[Prompt]) -> Step:
    """Trains `policy` on the pairs of `paired`; the model lands in `6-train/model`, safetensors only."""
    settings = run.config.train.model_dump(exclude={"keep_checkpoints", *OUTLETS})
    inputs = {"from": paired.digest, "policy": policy.digest, "train": settings, "seed": run.config.seed}
    stage = run.folder.stage(f"{base}/6-train", inputs)
    gated = run.config.evaluation.gate.enabled and base == f"iteration-{run.config.iterations}"  # only the last model is
    keep = run.config.train.keep_checkpoints if gated else 0

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
            keep_weights(stage.folder, keep)

        with clear_errors(stage.folder):
            facts = (read_json(stage.folder / "log.json") or {}).get("result")  # written last: training is over, only the rest is missing
            if facts is None:
                for other in (policy, run.named_judge, run.reference_judge):  # the trainer loads the weights in float32
                    if other is not None:
                        other.free()
                facts = _train(run, base, policy, list(paired.rows()), prompts, stage.folder, saved)
            shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
            shutil.rmtree(stage.folder / KEPT / f"checkpoint-{facts['steps_kept']}", ignore_errors=True)  # it is `model`
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
    model, tokenizer = load_model(_weights_of(policy), run.config.engine, dtype=_held_in(train.lora, device))
    _check_space(model, folder, adapter=train.lora is not None, keep=train.keep_checkpoints if run.config.evaluation.gate.enabled else 0)
    probe = _probe(run, tokenizer, prompts, rows, torch.bfloat16 if bf16 else None)
    before = probe(model)
    guard = CollapseGuard(probe, before, train.guard)
    args = SPAConfig(
        output_dir=str(folder / "checkpoints"),
        loss=train.loss,
        beta=train.beta,
        gamma=train.gamma,
        alpha=train.alpha,
        sft_weight=train.sft_weight,
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
        report_to=list(train.report_to) or "none",
        run_name=f"{run.config.name}/{base}",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
    )
    with _logs_beside(folder):
        trainer = SPATrainer(model, args, rows, tokenizer, peft_config=_lora(run), callbacks=[guard])
    steps = _fit(trainer, guard, run, base, _last_checkpoint(folder / "checkpoints"), saved)
    best = _last_checkpoint(folder / "checkpoints")
    if best is None:
        raise NothingToTrainOn(
            f"training collapsed before its first checkpoint ({guard.collapsed}); no model is handed over",
            hint="lower train.learning_rate, or set train.guard.every_steps lower to keep an earlier checkpoint",
        )
    hand_over(best, folder, policy, run)
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


@contextlib.contextmanager
def _logs_beside(folder: Path) -> Iterator[None]:
    """TensorBoard's callback reads its folder from the environment when it is made; its default would go with the checkpoints."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder / "tensorboard")
    try:
        yield
    finally:
        del os.environ[name]


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


def _probe(run: Context, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[dict[str, Any]], autocast: Any) -> Callable[[Any], Any]:
    """The guard's probe: the model in training answers a few training prompts, always the same and with the same seeds.

    Its first call, before training, keeps its answers: what their log-probabilities lose later is the drift.
    """
    from spalign.engines.transformers import TransformersEngine
    from spalign.rollout import sample
    from spalign.training.guard import Probe

    few = list(prompts[:: max(1, len(prompts) // run.config.train.guard.prompts)])[: run.config.train.guard.prompts]
    bare = run.constitution.bare()
    config = run.config.sample.model_copy(update={"n": 1})
    chosen = [(r["prompt_ids"], r["chosen_ids"]) for r in rows[:: max(1, len(rows) // len(few))]][: len(few)]
    own: list[tuple[Any, Any]] = []  # the first answers, as (prompt ids, answer ids)
    first: list[float] = []

    def probe(model: Any) -> Probe:
        training = model.training
        model.eval()
        engine = TransformersEngine(getattr(model, "module", model), tokenizer, batch_size=run.config.engine.batch_size)
        engine.autocast = autocast
        groups = sample(engine, few, bare, config, seed=run.config.seed, purpose="probe")
        answers = [r for g in groups for r in g.candidates]
        if not own:
            system = bare.system_variants[0].text
            own.extend((engine.encode_chat(g.prompt.with_system(system)), r.token_ids) for g in groups for r in g.candidates if r.token_ids)
        logps = [x for y in engine.loglikelihood(own) for x in y or ()]
        first.extend(logps if not first else [])
        likely = [x for y in engine.loglikelihood(chosen) for x in y or ()]
        model.train(training)
        n = len(answers)
        return Probe(
            words=sum(r.words for r in answers) / n,
            repetition=sum(repetition(r.text) for r in answers) / n,
            empty=sum(not r.text.strip() for r in answers) / n,
            kl=(sum(first) - sum(logps)) / max(1, len(logps)),
            chosen=sum(likely) / max(1, len(likely)),
        )

    return probe


def _held_in(lora: LoraConfig | None, device: str) -> Any:
    """What the policy is loaded in: float32 where its weights train, because bf16 loses updates of 1e-5; a frozen base as configured."""
    import torch

    kind = "float32" if lora is None else lora.base_dtype
    if kind == "auto":
        kind = "float32" if device == "cpu" else "bfloat16"
    return kind if kind == "nf4" else getattr(torch, kind)


def _lora(run: Context) -> Any:
    lora = run.config.train.lora
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


def _weights_of(policy: Policy) -> str:
    assert policy.weights is not None, "a policy without weights is refused before the run begins"
    return policy.weights


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; trainer_state.json is what transformers writes last."""
    found = []
    for p in folder.glob("checkpoint-*"):
        with contextlib.suppress(RunFolderError):  # torn by a kill
            if read_json(p / "trainer_state.json"):
                found.append(p)
    return sorted(found, key=step_of)


def _last_checkpoint(folder: Path) -> Path | None:
    return next(reversed(_whole_checkpoints(folder)), None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def keep_weights(folder: Path, keep: int) -> None:
    """Weights of the newest checkpoint and of `keep` before it, in `kept/`: links where the file system has them, so they cost no space
    while the checkpoint itself is there, and stay when the trainer removes that."""
    if not keep:
        return
    with clear_errors(folder):
        for checkpoint in _whole_checkpoints(folder / "checkpoints"):
            target = folder / KEPT / checkpoint.name
            if target.exists():
                continue
            half = target.with_name(target.name + ".tmp")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            for file in _weights(checkpoint):
                _link(file, half / file.name)
            half.rename(target)
        for old in kept_checkpoints(folder)[keep + 1 :]:
            shutil.rmtree(old)


def kept_checkpoints(folder: Path) -> list[Path]:
    """What `keep_weights` has kept, newest first."""
    return sorted((p for p in (folder / KEPT).glob("checkpoint-*") if p.suffix != ".tmp"), key=step_of, reverse=True)


def _weights(checkpoint: Path) -> list[Path]:
    return [f for f in checkpoint.iterdir() if f.suffix in {".safetensors", ".json"} and f.name != "trainer_state.json"]


def _link(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # a file system without links
        shutil.copy2(file, target)


def hand_over(checkpoint: Path, folder: Path, policy: Policy, run: Context, suffix: str = "") -> Path:
    """The checkpoint's model as `model{suffix}/` (and `adapter{suffix}/` where one was trained on `policy`, merged into the model).

    The model appears whole or not at all; one that is there is replaced.
    """
    from transformers import AutoTokenizer

    from spalign.engines.models import resolve

    target, adapter = folder / f"model{suffix}", folder / f"adapter{suffix}"
    half = target.with_name(target.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir()
    if (checkpoint / "adapter_config.json").exists():
        from spalign.training.merge import merge

        merge(checkpoint, half, model=_weights_of(policy), dtype="float32", trust_remote_code=run.config.engine.trust_remote_code)
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(checkpoint / name, adapter / name)
    else:
        for file in _weights(checkpoint):  # copied, not moved: the checkpoint stays whole until the stage is done
            shutil.copy2(file, half / file.name)
    tokenizer = AutoTokenizer.from_pretrained(resolve(_weights_of(policy)), trust_remote_code=run.config.engine.trust_remote_code)
    tokenizer.save_pretrained(half)
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)
    return target


def _check_space(model: Any, folder: Path, *, adapter: bool, keep: int) -> None:
    """Refuse to begin where the checkpoints cannot fit: weights and two moments, three times while one replaces the oldest, and the kept
    weights that are no link to one of them; of an adapter next to nothing, but its merged model."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    there = sum({(s := f.stat()).st_ino: s.st_size for f in folder.rglob("*") if f.is_file()}.values())  # a link is no second file
    need = (1.2 if adapter else 9 + max(0, keep - 1)) * weights - there
    free = shutil.disk_usage(folder).free
    if free < need:
        raise RunFolderError(
            f"{folder}: training needs up to {need / 1e9:.1f} GB for checkpoints, {free / 1e9:.1f} GB are free",
            hint="free some space, or choose another runs_dir, or lower train.keep_checkpoints; everything finished is kept",
        )
