"""SPATrainer: grouped preference training on `transformers.Trainer`, so that FSDP, DeepSpeed, checkpoints and trackers come with it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from spalign.errors import DataError
from spalign.training.adapters import fuse_adapters
from spalign.training.batches import collate, prepare, response_logps, without_groups_after
from spalign.training.groups import TrainingGroup, encode_row, group_rows
from spalign.training.loss import dpo_loss, pair_weights, sft_loss, spa_loss

logger = logging.getLogger(__name__)

_BETA = {"spa": 2.5, "simpo": 2.5, "dpo": 0.1, "sft": 1.0}


@dataclass
class SPAConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments of `SPATrainer`: those of `TrainingArguments`, and the loss's.

    A batch counts prompts: per_device_train_batch_size=2 runs two prompts, with all their responses and pairs, in one forward pass.
    loss: `spa` (Eq. 3), `simpo` (Eq. 3 with all weights 1), `dpo` (against the policy as it was before training), `sft` (on the chosen).
    beta: scale of the mean log-probabilities, for dpo of the summed ones. gamma: target margin, absolute. alpha: exponent of the weight.
    sft_weight: of the mean negative log-probability a token of the pairs' chosen responses, added to a loss of pairs (CPO's `cpo_alpha`).
    weight_column, margin_column: columns of the data to take a pair's weight (instead of Eq. 3's, for every loss of pairs) or its margin
    (instead of gamma) from.
    attention: over a packed row: `rows`, by plain causal kernels on any device, or `flex`, by torch's flex attention on CUDA.
    max_length: rows whose prompt and completion exceed it are dropped and counted (None: the model's window).
    """

    loss: str = field(default="spa", metadata={"help": "spa, simpo, dpo or sft."})
    beta: float | None = field(default=None, metadata={"help": "Scale of log-probabilities; 2.5, and 0.1 for dpo."})
    gamma: float = field(default=1.0, metadata={"help": "Target margin, absolute (not gamma/beta)."})
    alpha: float = field(default=1.0, metadata={"help": "Exponent of the pair weights; 0 is plain SimPO."})
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen responses' negative log-likelihood beside the pairs."})
    weight_column: str | None = field(default=None, metadata={"help": "Column with the weights of pairs."})
    margin_column: str | None = field(default=None, metadata={"help": "Column with the target margins of pairs."})
    attention: Literal["rows", "flex"] = field(default="rows", metadata={"help": "rows or flex (CUDA)."})
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt plus completion, in tokens."})
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW's peak learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Prompts in one forward pass."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are encoded by the trainer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in _BETA:
            raise ValueError(f"loss must be one of {', '.join(_BETA)}; got {self.loss!r}")
        if self.attention not in ("rows", "flex"):
            raise ValueError(f"attention must be rows or flex; got {self.attention!r}")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel would replace the forward pass that the tiled LM head is part of: leave it out")
        if self.beta is None:
            self.beta = _BETA[self.loss]
        if self.beta <= 0 or min(self.gamma, self.alpha, self.sft_weight) < 0:
            numbers = f"{self.beta}, {self.gamma}, {self.alpha}, {self.sft_weight}"
            raise ValueError(f"beta must be > 0, gamma, alpha and sft_weight >= 0; got {numbers}")

    @property
    def weighs_by_gap(self) -> bool:
        """Whether Eq. 3's weights are in use."""
        return self.loss == "spa" and self.alpha > 0 and self.weight_column is None


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Over the whole optimiser step: all micro-batches and ranks."""

    pairs: float
    mean_gap: float
    chosen_tokens: float
    """Of distinct chosen responses."""
    pair_tokens: float
    """Of the pairs' chosen responses, one that stands in three pairs three times."""


class SPATrainer(Trainer):  # type: ignore[misc]
    """Trains a policy on preference rows; identical prompts and responses are found and run once.

    model: a model, or a name that `from_pretrained` takes (loaded in float32: bf16 weights lose updates of 1e-5).
    train_dataset: rows in TRL's preference format (`prompt`, `chosen`, `rejected`; optional `gap`, `prompt_ids`, `chosen_ids`,
    `rejected_ids`, `id`, and the columns that the arguments name; others are ignored), or `TrainingGroup`s.
    processing_class: the tokenizer. peft_config: trains an adapter instead of all weights.
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
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if processing_class is None:
            from transformers import AutoTokenizer

            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.train_dataset: list[TrainingGroup]
        self.dropped: dict[str, int] = {}
        groups = self._groups(train_dataset, model, args, processing_class)
        if args.attention == "flex" and not getattr(model, "is_quantized", False):
            model.to(args.device)  # where it is tried
        layout = prepare(model, args.attention)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # or the adapter's first weights would be another session's
            model = get_peft_model(model, peft_config)
            fuse_adapters(model)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        pad = processing_class.pad_token_id if processing_class.pad_token_id is not None else processing_class.eos_token_id
        collator = partial(collate, layout=layout, pad=pad)
        super().__init__(model=model, args=args, train_dataset=groups, data_collator=collator, processing_class=processing_class, **kwargs)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step
        self._totals = StepTotals(1.0, 1.0, 1.0, 1.0)
        self._names: list[str] = []
        self._metrics: list[Tensor] = []
        self._not_finite: list[str] = []

    def _groups(self, rows: Any, model: Any, args: SPAConfig, tokenizer: PreTrainedTokenizerBase) -> list[TrainingGroup]:
        if not rows:
            raise DataError("the training data is empty", hint="see the funnel for where the pairs went")
        if all(isinstance(r, TrainingGroup) for r in rows):
            return list(rows)

        def chat(turns: Any) -> list[int]:
            return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))

        def answer(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]

        def plain(text: str) -> list[int]:
            return list(tokenizer(text)["input_ids"])

        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        columns = {"weight_column": args.weight_column, "margin_column": args.margin_column}
        encoded = (encode_row(row, i, chat=chat, answer=answer, plain=plain, **columns) for i, row in enumerate(rows))
        groups, dropped = group_rows(encoded, max_length=min(args.max_length or window, window), needs_gap=args.weighs_by_gap)
        self.dropped = dict(dropped)
        if not groups:
            raise DataError(
                f"no pair is left to train on (dropped: {self.dropped})", hint="see the reasons; raise max_length for 'too long'"
            )
        return groups

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; for DPO after one pass over all responses with the policy as it is now, the adapter off."""
        if self.args.loss == "dpo" and not all(g.references for g in self.train_dataset):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise DataError(
                    "dpo's reference pass runs before the weights are spread over devices",
                    hint="give TrainingGroups with `references`, or train with DDP",
                )
            self.train_dataset = self._with_references(self.train_dataset)
        return super().train(*args, **kwargs)

    @torch.no_grad()
    def _with_references(self, groups: Sequence[TrainingGroup]) -> list[TrainingGroup]:
        self._move_model_to_device(self.model, self.args.device)
        adapter_off = getattr(self.model, "disable_adapter", contextlib.nullcontext)
        training = self.model.training
        self.model.eval()
        out: list[TrainingGroup] = []
        with adapter_off(), self.autocast_smart_context_manager() if self.args.bf16 else contextlib.nullcontext():
            for i in range(0, len(groups), self.args.per_device_train_batch_size):
                some = groups[i : i + self.args.per_device_train_batch_size]
                logps, count = response_logps(self.model, self._prepare_inputs(self.data_collator(some)))
                sums = iter((logps * count).tolist())
                out += [replace(g, references=tuple(next(sums) for _ in g.responses)) for g in some]
        self.model.train(training)
        return out

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of one optimiser step; what a loss divides by is counted over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.accelerator.num_processes > 1:
            self._count_once(batches)
        self._not_finite.clear()
        mine = torch.zeros(4, dtype=torch.float64)
        for b in batches:
            count = torch.bincount(b["owner"])
            once, each = count[b["chosen"].unique()].sum(), count[b["chosen"]].sum()
            mine += torch.tensor([len(b["gaps"]), b["gaps"].double().sum(), once, each], dtype=torch.float64)
        pairs, gap, once, each = self.accelerator.reduce(mine.float().to(device), reduction="sum").tolist()
        if self.args.weighs_by_gap and batches and gap <= 0:  # Eq. 3 is 0/0 there: pairs of no weight
            logger.warning("spalign: all %d pairs of step %d have gap 0 and so no weight", pairs, self.state.global_step + 1)
        self._totals = StepTotals(pairs, gap / pairs if gap > 0 else 1.0, once, each)
        self._names = [name for b in batches for name in b["names"]]
        return batches, None

    def _count_once(self, batches: list[dict[str, Any]]) -> None:
        """An epoch whose prompts do not share evenly among the ranks is filled up with prompts that have been: these count for nothing."""
        ranks, size, prompts = self.accelerator.num_processes, self.args.per_device_train_batch_size, len(self.train_dataset)
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
        loss = self._loss(logps, count, inputs)
        if not torch.isfinite(loss):
            self._not_finite.append(f"loss is {loss.item()} at step {self.state.global_step + 1}, in {_listed(inputs['names'])}")
            if self.accelerator.num_processes == 1:
                raise FloatingPointError(self._not_finite[0])  # of several ranks all must stop, at the end of the step
        chosen, rejected = logps[inputs["chosen"]], logps[inputs["rejected"]]
        with torch.no_grad():
            self._metrics.append(
                torch.stack(
                    [
                        (chosen > rejected).sum().float(),
                        (chosen - rejected).sum(),
                        chosen.sum(),
                        rejected.sum(),
                        count[inputs["chosen"]].sum().float(),
                        count[inputs["rejected"]].sum().float(),
                        torch.tensor(float(len(chosen)), device=loss.device),
                    ]
                )
            )
        # DDP averages gradients over ranks; the loss is already divided by what all ranks have
        loss = loss * self.accelerator.num_processes
        return (loss, {"logps": logps}) if return_outputs else loss

    def _loss(self, logps: Tensor, count: Tensor, inputs: dict[str, Any]) -> Tensor:
        args, totals = self.args, self._totals
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
        """Adds accuracy, margin and log-probabilities of the pairs since the last log; also to the trackers."""
        if self._metrics:
            mine = torch.stack(self._metrics).sum(0)
            right, margin, chosen, rejected, c_len, r_len, n = self.accelerator.reduce(mine, reduction="sum").tolist()
            logs = {
                **logs,
                "pairs/accuracy": right / n,
                "pairs/margin": margin / n,
                "logps/chosen": chosen / n,
                "logps/rejected": rejected / n,
                "length/chosen": c_len / n,
                "length/rejected": r_len / n,
            }
            self._metrics.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers', without its pickled copy of the arguments: only safetensors and JSON are left behind."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return "rows " + ", ".join(names[:8]) + more
