"""SPATrainer: Eq. 3 on `transformers.Trainer`, so that FSDP, DeepSpeed, checkpoints and trackers come with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from spalign.errors import DataError
from spalign.training.batches import collate, layout_for, response_logps
from spalign.training.groups import TrainingGroup, encode_row, group_rows
from spalign.training.loss import pair_weights, spa_loss

logger = logging.getLogger(__name__)


@dataclass
class SPAConfig(TrainingArguments):  # type: ignore[misc]
    """Arguments of `SPATrainer`: those of `TrainingArguments`, and Eq. 3's.

    A batch counts prompts: per_device_train_batch_size=2 runs two prompts, with all their responses and pairs, in one forward pass.
    beta: scale of the mean log-probabilities. gamma: target margin, absolute. alpha: exponent of the weight; 0 is plain SimPO.
    max_length: rows whose prompt and completion exceed it are dropped and counted (None: the model's window).
    """

    beta: float = field(default=2.5, metadata={"help": "Scale of the mean log-probabilities."})
    gamma: float = field(default=1.0, metadata={"help": "Target margin, absolute (not gamma/beta)."})
    alpha: float = field(default=1.0, metadata={"help": "Exponent of the pair weights; 0 is plain SimPO."})
    max_length: int | None = field(default=None, metadata={"help": "Longest prompt plus completion, in tokens."})
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW's peak learning rate."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Prompts in one forward pass."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: rows are encoded by the trainer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or self.gamma < 0 or self.alpha < 0:
            raise ValueError(f"beta must be > 0, gamma and alpha >= 0; got {self.beta}, {self.gamma}, {self.alpha}")


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Over the whole optimiser step: all micro-batches and ranks."""

    pairs: float
    mean_gap: float


class SPATrainer(Trainer):  # type: ignore[misc]
    """Trains a policy on preference rows; identical prompts and responses are found and run once.

    model: a model, or a name that `from_pretrained` takes (loaded in float32: bf16 weights lose updates of 1e-5).
    train_dataset: rows in TRL's preference format (`prompt`, `chosen`, `rejected`; optional `gap`, `prompt_ids`, `chosen_ids`,
    `rejected_ids`, `id`; other columns are ignored), or `TrainingGroup`s.
    processing_class: the tokenizer. peft_config: trains an adapter instead of all weights.
    Raises DataError where nothing is left to train on, or alpha > 0 and gaps are missing.
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
        groups = self._groups(train_dataset, model, args, processing_class)
        layout = layout_for(model.config)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # or the adapter's first weights would be another session's
            model = get_peft_model(model, peft_config)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        pad = processing_class.pad_token_id if processing_class.pad_token_id is not None else processing_class.eos_token_id
        collator = partial(collate, layout=layout, pad=pad)
        super().__init__(model=model, args=args, train_dataset=groups, data_collator=collator, processing_class=processing_class, **kwargs)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step
        self._totals = StepTotals(1.0, 1.0)
        self._metrics: list[Tensor] = []

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
        encoded = (encode_row(row, i, chat=chat, answer=answer, plain=plain) for i, row in enumerate(rows))
        groups, dropped = group_rows(encoded, max_length=min(args.max_length or window, window), needs_gap=args.alpha > 0)
        if not groups:
            raise DataError(
                f"no pair is left to train on (dropped: {dict(dropped)})", hint="see the reasons; raise max_length for 'too long'"
            )
        return groups

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of one optimiser step; Eq. 3's mean Delta and number of pairs are taken over all of them and all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        gaps = torch.cat([b["gaps"] for b in batches]) if batches else torch.zeros(0)
        totals = torch.tensor([float(len(gaps)), float(gaps.sum())], dtype=torch.float32, device=device)
        totals = self.accelerator.reduce(totals, reduction="sum")
        pairs, gap = float(totals[0]), float(totals[1])
        if self.args.alpha > 0 and batches and gap <= 0:  # Eq. 3 is 0/0 there: pairs of no weight
            logger.warning("spalign: all %d pairs of step %d have gap 0 and so no weight", pairs, self.state.global_step + 1)
        self._totals = StepTotals(pairs, gap / pairs if gap > 0 else 1.0)
        return batches, None

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """This micro-batch's share of Eq. 3; the shares of a step add up to it."""
        logps, count = response_logps(model, inputs)
        chosen, rejected = logps[inputs["chosen"]], logps[inputs["rejected"]]
        weights = pair_weights(inputs["gaps"].to(logps.dtype), self._totals.mean_gap, self.args.alpha)
        loss = spa_loss(chosen, rejected, weights, beta=self.args.beta, gamma=self.args.gamma, num_pairs=self._totals.pairs)
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
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.state.global_step + 1}")
        # DDP averages gradients over ranks; the loss is already divided by the pairs of all ranks
        loss = loss * self.accelerator.num_processes
        return (loss, {"logps": logps}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds accuracy, margin and log-probabilities of the pairs since the last log; also to the trackers."""
        if self._metrics:
            right, margin, chosen, rejected, c_len, r_len, n = torch.stack(self._metrics).sum(0).tolist()
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
