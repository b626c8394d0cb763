"""SPATrainer: grouped preference training on `transformers.Trainer`, so that FSDP, DeepSpeed, checkpoints and trackers come with it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.trainer_utils import speed_metrics

from spalign.engines.loading import load_tokenizer
from spalign.errors import DataError
from spalign.training.arguments import SPAConfig
from spalign.training.batches import collate, moved, response_logps, without_groups_after
from spalign.training.groups import TrainingGroup
from spalign.training.inputs import make_ready, one_device, read_groups
from spalign.training.loss import dpo_loss, pair_weights, sft_loss, spa_loss
from spalign.training.sums import StepTotals, counted, counted_groups, pair_metrics, pair_sums

__all__ = ["SPAConfig", "SPATrainer"]

logger = logging.getLogger(__name__)


class SPATrainer(Trainer):  # type: ignore[misc]
    """Trains a policy on preference rows; identical prompts and responses are found and run once.

    model: a model (of PEFT's, too), or a name that `from_pretrained` takes (loaded in float32: bf16 weights lose updates of 1e-5).
    train_dataset: rows in TRL's preference format (`prompt`, `chosen`, `rejected`; optional `gap`, `prompt_ids`, `chosen_ids`,
    `rejected_ids`, `id`, and the columns that the arguments name; others are ignored), or `TrainingGroup`s. eval_dataset: the same, or
    several by name. processing_class: the tokenizer. peft_config: trains a LoRA or DoRA adapter instead of all weights.
    dropped: rows that were left out, by reason.
    Raises DataError where nothing is left to train on, or Eq. 3's weights are in use and gaps are missing; FloatingPointError, naming the
    rows, at a step whose loss or gradient is not finite, before it changes a weight.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: SPAConfig | None = None,
        train_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or SPAConfig(output_dir="spa-out")
        if not isinstance(args, SPAConfig):
            raise ValueError(f"args must be an SPAConfig; got {type(args).__name__}")
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if kwargs.get(name):
                raise ValueError(f"{name} is never called: args.loss says the loss, and `evaluate` gives it and the pairs' metrics")
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None:
            if not (name := model.config._name_or_path):
                raise ValueError("the model names no tokenizer: give it as processing_class")
            processing_class = load_tokenizer(name)
        self.train_dataset: Any
        self.eval_dataset: Any
        self._read = partial(read_groups, model=model, args=args, tokenizer=processing_class)
        held_out = self._held_out(kwargs.pop("eval_dataset", None))
        groups, self.dropped = (None, {}) if train_dataset is None and held_out is not None else self._read(train_dataset)
        layout, model = make_ready(model, args, peft_config)
        one_device(args, model)
        pad = processing_class.pad_token_id if processing_class.pad_token_id is not None else processing_class.eos_token_id
        collator = partial(collate, layout=layout, pad=pad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=groups,
            eval_dataset=held_out,
            data_collator=collator,
            processing_class=processing_class,
            **kwargs,
        )
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step
        self._totals = StepTotals(1.0, 1.0, 1.0, 1.0)
        self._names: list[str] = []
        self._metrics: list[Tensor] = []
        self._not_finite: list[str] = []

    def _held_out(self, rows: Any) -> Any:
        """Groups, or groups by name."""
        if isinstance(rows, Mapping):
            return {name: self._read(some)[0] for name, some in rows.items()}
        return None if rows is None else self._read(rows)[0]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; for DPO after one pass over all responses with the policy as it is now."""
        if self.train_dataset is None:
            raise DataError("there is nothing to train on", hint="give train_dataset")
        if self.args.loss == "dpo":
            self.train_dataset = self._with_references(self.train_dataset)
            held_out = self.eval_dataset
            if isinstance(held_out, dict):
                self.eval_dataset = {name: self._with_references(groups) for name, groups in held_out.items()}
            elif held_out is not None:
                self.eval_dataset = self._with_references(held_out)
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _with_references(self, groups: list[TrainingGroup]) -> list[TrainingGroup]:
        if all(g.references for g in groups):
            return groups
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise DataError(
                "dpo's reference pass runs before the weights are spread over devices",
                hint="give TrainingGroups with `references`, or train with DDP",
            )
        out: list[TrainingGroup] = []
        with self._evaluating() as model:
            for i in range(0, len(groups), self.args.per_device_train_batch_size):
                some = groups[i : i + self.args.per_device_train_batch_size]
                logps, count = response_logps(model, self._prepare_inputs(self.data_collator(some)))
                sums = iter((logps * count).tolist())
                out += [replace(g, references=tuple(next(sums) for _ in g.responses)) for g in some]
        return out

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[Any]:
        """The policy, for passes without a gradient."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if sharded and not self.accelerator._models:
            raise DataError("the weights are spread over devices when training begins, not before", hint="set eval_on_start=True")
        model = self.model_wrapped if sharded else self.model
        if not sharded:
            self._move_model_to_device(model, self.args.device)
        training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():  # as in training, before which the model does not do so by itself
                yield model
        finally:
            model.train(training)

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics of held-out pairs; what a loss divides by is counted over all of them, on all ranks.

        eval_dataset: as the trainer takes it; default: what it was given. Raises DataError where there is none.
        """
        data = self.eval_dataset if eval_dataset is None else self._held_out(eval_dataset)
        if data is None:
            raise DataError("there is nothing to evaluate on", hint="give eval_dataset")
        if isinstance(data, dict):
            each = (self.evaluate(groups, ignore_keys, f"{metric_key_prefix}_{name}") for name, groups in data.items())
            return {key: value for found in each for key, value in found.items()}
        if self.args.loss == "dpo" and self.state.global_step and not all(g.references for g in data):
            raise DataError("dpo's reference is the policy before training", hint="give these rows to the trainer as eval_dataset")
        data = self._with_references(data) if self.args.loss == "dpo" else data
        began, ranks, rank = time.time(), self.accelerator.num_processes, self.accelerator.process_index
        size = self.args.per_device_eval_batch_size
        batches = [data[i : i + size] for i in range(0, len(data), size)]
        totals = StepTotals.of(counted_groups(data))
        sums = torch.zeros(8, device=self.args.device)
        with self._evaluating() as model:
            for first in range(0, len(batches), ranks):
                mine = first + rank
                batch = self._prepare_inputs(self.data_collator(batches[min(mine, len(batches) - 1)]))
                if mine >= len(batches):  # all ranks make as many passes
                    without_groups_after(batch, 0)
                logps, count = response_logps(model, batch)
                loss = self._loss(logps, count, batch, totals)
                sums += torch.cat([loss.detach().float().reshape(1), pair_sums(logps, count, batch)])
        loss, *pairs = self.accelerator.reduce(sums, reduction="sum").tolist()
        found = {"loss": loss, **pair_metrics(pairs)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(data), num_steps=len(batches))
        super().log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """There is nothing to predict. Raises ValueError."""
        raise ValueError("SPATrainer predicts nothing: `evaluate` gives loss and metrics of pairs, `spalign judge` scores answers")

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of one optimiser step; what a loss divides by is counted over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.accelerator.num_processes > 1:
            self._count_once(batches)
        self._not_finite.clear()
        sums = self.accelerator.reduce(counted(batches).float().to(device), reduction="sum").tolist()
        pairs, gap, *_ = sums
        if self.args.weighs_by_gap and batches and gap <= 0:  # Eq. 3 is 0/0 there: pairs of no weight
            logger.warning("spalign: all %d pairs of step %d have gap 0 and so no weight", pairs, self.state.global_step + 1)
        self._totals = StepTotals.of(sums)
        self._names = [name for b in batches for name in b["names"]]
        return batches, None

    def _count_once(self, batches: list[dict[str, Any]]) -> None:
        """An epoch whose prompts do not share evenly among the ranks is filled up with prompts that have been: these count for nothing."""
        if self.args.dataloader_drop_last:  # leaves them out instead
            return
        ranks, size, prompts = self.accelerator.num_processes, self._train_batch_size, len(self.train_dataset)
        rounds = -(-prompts // (ranks * size))
        steps = -(-rounds // self.args.gradient_accumulation_steps)
        first = self.state.global_step % steps * self.args.gradient_accumulation_steps
        for i, batch in enumerate(batches, first):
            own = prompts - (i * ranks + self.accelerator.process_index) * size
            if own < size:
                without_groups_after(batch, max(0, own))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """This micro-batch's share of the step's loss; the shares of a step add up to it."""
        logps, count = response_logps(model, inputs)
        loss = self._loss(logps, count, inputs, self._totals)
        if not torch.isfinite(loss):
            names = self._names_not_finite(logps, count, inputs)
            self._not_finite.append(f"loss is {loss.item()} at step {self.state.global_step + 1}, in {_listed(names)}")
            if self.accelerator.num_processes == 1:
                raise FloatingPointError(self._not_finite[0])  # of several ranks all must stop, at the end of the step
        with torch.no_grad():
            self._metrics.append(pair_sums(logps, count, inputs))
        # DDP averages gradients over ranks; the loss is already divided by what all ranks have
        loss = loss * self.accelerator.num_processes
        return (loss, {"logps": logps}) if return_outputs else loss

    @torch.no_grad()
    def _names_not_finite(self, logps: Tensor, count: Tensor, inputs: dict[str, Any]) -> list[str]:
        """Rows whose own share of the loss is not finite; all, where only the sum is not."""
        parts = [part for part in ("chosen", "rejected", "gaps", "weights", "margins") if part in inputs]
        found = []
        for i, name in enumerate(inputs["names"]):
            alone = dict(inputs)
            for part in parts:
                alone[part] = inputs[part][i : i + 1]
            if not torch.isfinite(self._loss(logps, count, alone, self._totals)):
                found.append(name)
        return found or inputs["names"]

    def _loss(self, logps: Tensor, count: Tensor, inputs: dict[str, Any], totals: StepTotals) -> Tensor:
        args = self.args
        chosen, rejected = inputs["chosen"], inputs["rejected"]
        if args.loss == "sft":
            once = chosen.unique()
            return sft_loss((logps * count)[once], totals.chosen_tokens)
        if args.weight_column is not None:
            weights = inputs["weights"]
        else:
            weights = pair_weights(inputs["gaps"].to(logps.dtype), totals.mean_gap, args.alpha if args.loss == "spa" else 0)
        if args.loss == "dpo":
            sums, references = logps * count, inputs["references"]
            sides = (sums[chosen], sums[rejected], references[chosen], references[rejected])
            loss = dpo_loss(*sides, weights, beta=args.beta, num_pairs=totals.pairs)
        else:
            gamma = args.gamma if args.margin_column is None else inputs["margins"]
            loss = spa_loss(logps[chosen], logps[rejected], weights, beta=args.beta, gamma=gamma, num_pairs=totals.pairs)
        return loss + args.sft_weight * sft_loss((logps * count)[chosen], totals.pair_tokens) if args.sft_weight else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer asks for the norm after the last backward pass of a step and before the optimiser's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.num_processes > 1:
            losses = self.accelerator.reduce(torch.tensor(float(len(self._not_finite)), device=self.args.device), reduction="sum")
            if losses > 0:
                raise FloatingPointError(gather_object(self._not_finite)[0])
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)):
            raise FloatingPointError(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}, in {_listed(self._names)}"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and log-probabilities of the pairs since the last log to the loss's; also to the trackers."""
        if self._metrics and {"loss", "train_loss"} & logs.keys():  # which all ranks log
            sums = self.accelerator.reduce(torch.stack(self._metrics).sum(0), reduction="sum").tolist()
            logs = {**logs, **pair_metrics(sums)}
            self._metrics.clear()
        super().log(logs, start_time)

    def _prepare_input(self, data: Any) -> Any:
        """To the device, and no more: transformers would round gaps, weights and references to DeepSpeed's precision."""
        return moved(data, self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers', without its pickled copy of the arguments: only safetensors and JSON are left behind."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


def _listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return "rows " + ", ".join(names[:8]) + more
